"""The pages of results: their commands are valid, and no two of a page write into one folder."""

from __future__ import annotations

import shlex

import pytest

from adapeft.config.experiments import Trials, load_comparison
from adapeft.config.load import load_config, parse_section
from tests.benchmarks.reproduce import DEMO_MODEL, RESULTS, commands_of, is_complete
from tests.test_readme import ROOT

PAGES = sorted(RESULTS.glob("*.md"))


def config_of(command: str):
    """Return the config of an ``adapeft`` command that takes one."""
    _, name, file, *overrides = shlex.split(command.replace(DEMO_MODEL, "model"))
    if name == "compare":
        return load_comparison(ROOT / file, overrides)[1]
    if name == "validate":
        overrides = parse_section(Trials, overrides)[1]
    return load_config(ROOT / file, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_valid_and_do_not_disturb_each_other(page):
    commands = [command for command in commands_of(page) if is_complete(command)]
    outputs = [
        config_of(command).output
        for command in commands
        if command.split()[:2] in (["adapeft", name] for name in ("compare", "run", "select", "validate"))
    ]
    assert sorted(set(outputs)) == sorted(outputs)


def test_commands_are_found_in_paragraphs_and_blocks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nMade with\n`adapeft run a.yaml model.name=… x=1`, and `adapeft show` in a sentence.\n\n"
        "```\nadapeft select b.yaml \\\n  y=2\npython -m tests.benchmarks.swap MODEL > out\n```\n"
    )
    first, second, third = commands_of(page)
    assert first == "adapeft run a.yaml model.name=$(python deploy/demo/docstrings.py --print-model) x=1"
    assert second == "adapeft select b.yaml y=2"
    assert [is_complete(command) for command in (first, second, third)] == [True, True, False]
