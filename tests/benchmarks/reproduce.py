"""Run the commands of a page of results: ``python -m tests.benchmarks.reproduce stsb``, or ``make results PAGE=stsb``.

A command is a line of code that begins with ``adapeft`` or ``python``, in a paragraph or in a block. Those that name no
model but ``…`` take the demo's; those with another placeholder (``MODEL``, ``RUN…``) are printed and left out. Finished
runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.report import RESULTS

_ROOT = Path(__file__).parents[2]
_CODE = re.compile(r"^`((?:adapeft|python) [^`]+)`", re.MULTILINE)
_BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|…")
DEMO_MODEL = "$(python deploy/demo/docstrings.py --print-model)"


def commands_of(page: Path) -> list[str]:
    """Return the commands of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    found = {match.start(): [match[1]] for match in _CODE.finditer(text)}
    for match in _BLOCK.finditer(text):
        lines = match[1].replace("\\\n", " ").splitlines()
        found[match.start()] = [" ".join(line.split()) for line in lines if line.startswith(("adapeft ", "python "))]
    return [
        command.replace("model.name=…", f"model.name={DEMO_MODEL}")
        for _, each in sorted(found.items())
        for command in each
    ]


def is_complete(command: str) -> bool:
    """Return whether a command has no placeholder."""
    return not _PLACEHOLDER.search(command)


def main() -> None:
    """Run a page's commands one after the other, until one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=sorted(path.stem for path in RESULTS.glob("*.md")))
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for command in commands_of(RESULTS / f"{arguments.page}.md"):
        print(command if is_complete(command) else f"# with values of your own: {command}", flush=True)
        if is_complete(command) and not arguments.list:
            subprocess.run(command, shell=True, cwd=_ROOT, env=os.environ | {"PATH": path}, check=True)


if __name__ == "__main__":
    main()
