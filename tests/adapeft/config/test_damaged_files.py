"""Damaged or malicious YAML loads as a config or raises one error that names the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapeft import AdapeftError
from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.files.damage import check_yaml
from tests.support.damage import check, damaged_bytes, damaged_trees, examples

TREE = {
    "model": {"name": "base", "task": "causal-lm"},
    "data": {"train": "train.txt", "evaluation": "validation.txt", "max_length": 64},
    "output": "runs/a",
    "select": {"budget": "0.5%", "include": ["*.weight"], "options": ["row", "lora"]},
    "train": {"epochs": 3, "learning_rate": 1e-3},
    "cluster": {"workers": 2},
    "seed": 3,
}
PIECES = [
    *("&a ", "*a", "!!python/object/apply:os.system ['x']", "!!python/name:os.system", "!!binary aGk=", "!!set {a}"),
    *("!!timestamp x", "!!int x", "!!bool x", "!!float x", "<<: *a", "? [1]", "? ", "- ", "{", "}", "[", "]", "'", '"'),
    *("${", "}", "${seed}", "${select.budget}", "${oc.env:HOME}", "${oc.decode:'[1,'}", "${oc.create:{a: 1}}", "${x:}"),
    *("---\n", "...\n", "%YAML 9.9\n", "\t", "\r", "\x00", "\ufeff", "\u2028", "null: 1\n", "1: 2\n", "a: b: c\n"),
    *("9" * 5000, "1e999", ".nan", "~", "0x1g", "1_000", "2020-01-01", "12:30:00", "\n  ", "#", "|\n", ">\n"),
]


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in" / "damaged.yaml"


def test_bytes(path):
    text = yaml.safe_dump(TREE).encode()

    @examples(150)
    @given(damaged_bytes(text))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check_config(path)

    run()


@pytest.mark.slow
def test_values(path):
    @examples(150)
    @given(damaged_trees(TREE))
    def run(tree: Any) -> None:
        path.write_text(yaml.safe_dump(copy.deepcopy(tree), allow_unicode=False))
        check_config(path)

    run()


def test_what_yaml_can_say(path):
    lines = yaml.safe_dump(TREE).splitlines(keepends=True)

    @examples(200)
    @given(st.lists(st.tuples(st.integers(0, len(lines) - 1), st.sampled_from(PIECES)), min_size=1, max_size=4))
    def run(pieces: list[tuple[int, str]]) -> None:
        damaged = list(lines)
        for place, piece in pieces:
            key, colon, _ = damaged[place].partition(":")
            damaged[place] = f"{key}{colon} {piece}\n"
        path.write_bytes("".join(damaged).encode())
        check_config(path)

    run()


def check_config(path: Path) -> None:
    found = check(lambda: load_config(path), path)
    if found is not None:
        assert isinstance(found, Config)
        path.write_text(to_yaml(found))
        assert load_config(path) == found


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
    "references": "a0: xx\n" + "".join(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}\n" for n in range(1, 40)),
    "itself": "a: &a [*a]\n",
    "lists": "a: " + "[" * 100_000,
    "maps": "a: " + "{a: " * 50_000,
    "blocks": "".join(f"{' ' * n}a:\n" for n in range(400)),
    "reference in reference": "a: " + "${" * 500 + "a" + "}" * 500,
    "text": "a: " + "x" * 2**20,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_texts_of_much_content(path, bomb):
    path.write_text(BOMBS[bomb])
    assert check(lambda: load_config(path), path) is None
    with pytest.raises(AdapeftError, match=r"damaged.yaml: cannot be read .*(alias|references|nested|at most)"):
        load_config(path)


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system [x]", "python/object/apply:pathlib.PosixPath [x]", "x y"]
)
def test_tags_make_nothing(path, tag):
    path.write_text(yaml.safe_dump(TREE).replace("seed: 3", f"seed: !!{tag}"))
    assert check(lambda: load_config(path), path) is None
    with pytest.raises(AdapeftError, match="is a tag: write the value without it"):
        load_config(path)


def test_the_most_that_references_come_to(path):
    """The maximum number of references, in the chain that expands them most, is still handled quickly."""
    chain = "".join(f"a{n}: {f'${{a{n - 1}}}' * 3}\n" for n in range(1, 7))
    check_yaml(chain)
    path.write_text("a0: xx\n" + chain)
    assert check(lambda: load_config(path), path) is None
