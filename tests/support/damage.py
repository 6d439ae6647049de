"""Damage to files, as by a crash, a bad disk or an attacker, and checks of loaders."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adapeft import AdapeftError

MORE = int(os.environ.get("DAMAGE_TIMES", "1"))
"""``DAMAGE_TIMES=100 pytest …`` runs 100 times as many examples as by default."""
SECONDS = 20
ROOM = 2**30
"""Bytes of address space that a loader may allocate; the files here have a few thousand bytes."""

HUGE = 2**62
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 2**31, HUGE, 2**63, 2**64, -HUGE, 10**400, 0.5, 1e300),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "1",
        "nan",
        "a\u0000b",
        "\u202e\ud7ff\u00fc",
        "\x1b[2J",
        "[/bold]",
    ),
    *("[/bold]", "/etc/passwd", "../../outside", "..", ".", "file:///etc/passwd", "__class__", "x" * 5000),
    *([], {}, [[]], [None], [-1], [HUGE, HUGE], [2**40, 2**40], [0], [1.5], ["x"], {"": None}, {"shape": [HUGE]}),
]
ODD_TEXTS = {
    **{text: text for text in ("", "{", "null", "NaN", '"', "[]", "1", "{}")},
    **{"deep list": "[" * 20_000, "deep object": '{"a":' * 20_000, "many digits": "9" * 5000},
}


def examples(number: int) -> settings:
    """Return Hypothesis settings with ``number`` examples, the same in every run."""
    return settings(
        max_examples=number * MORE,
        derandomize=MORE == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw ``content`` flipped, cut, extended, rotated, or with another length of its header or footer."""
    places = st.integers(0, len(content))
    lengths = st.sampled_from([0, 1, 7, 8, len(content), 2**31, 2**32, 2**53, 2**63, 2**64 - 1])

    def flip(flips: list[tuple[int, int]]) -> bytes:
        flipped = bytearray(content)
        for place, bits in flips:
            flipped[place % len(content)] ^= bits
        return bytes(flipped)

    return st.one_of(
        st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4).map(flip),
        places.map(lambda end: content[:end]),
        places.map(lambda start: content[start:]),
        st.binary(min_size=1, max_size=64).map(lambda more: content + more),
        st.tuples(places, st.binary(max_size=16)).map(lambda cut: content[: cut[0]] + cut[1] + content[cut[0] :]),
        places.map(lambda cut: content[cut:] + content[:cut]),
        lengths.map(lambda length: length.to_bytes(8, "little") + content[8:]),
        lengths.map(lambda length: content[:-8] + length.to_bytes(8, "little")),
        st.binary(max_size=200),
    )


@st.composite
def damaged_trees(draw: st.DrawFn, tree: Any) -> Any:
    """Draw a JSON ``tree`` with up to three values replaced, removed, duplicated, renamed or nested."""
    root = {"": deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(root))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "rename", "nest"]))
        if kind == "replace":
            holder[key] = deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif kind == "nest":
            holder[key] = [holder[key]]
        elif holder is root:
            continue
        elif kind == "remove":
            del holder[key]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(key, deepcopy(holder[key]))
        elif isinstance(holder, dict):
            holder[str(draw(st.sampled_from(ODD_VALUES)))] = holder.pop(key)
    return root[""]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield tree, key
        yield from _places(value)


def with_header(content: bytes, header: Any) -> bytes:
    """Return a safetensors file with the body of ``content`` and another JSON header."""
    length = int.from_bytes(content[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def header_of(content: bytes) -> dict[str, Any]:
    """Return the JSON header of a safetensors file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_description(content: bytes, said: str | dict[str, Any]) -> bytes:
    """Return one of our safetensors files with a replaced (text) or updated (entries) description."""
    header = header_of(content)
    text = said if isinstance(said, str) else json.dumps({**json.loads(header["__metadata__"]["adapeft"]), **said})
    return with_header(content, {**header, "__metadata__": {"adapeft": text}})


def damaged_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw damaged bytes, a damaged header (dtypes, shapes, offsets), or a damaged description in the header."""
    header = header_of(content)
    said = json.loads(header.get("__metadata__", {}).get("adapeft", "{}"))

    def saying(description: Any) -> bytes:
        return with_description(content, json.dumps(description))

    return st.one_of(
        damaged_bytes(content),
        damaged_trees(header).map(lambda tree: with_header(content, tree)),
        dtypes_and_shapes(header).map(lambda tree: with_header(content, tree)),
        damaged_trees(said).map(saying),
        damaged_trees(said).map(saying),
        st.sampled_from(sorted(ODD_TEXTS)).map(lambda name: with_description(content, ODD_TEXTS[name])),
    )


@st.composite
def dtypes_and_shapes(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any]:
    """Draw the header with another dtype and shape of one tensor, usually for the same number of bytes."""
    header = deepcopy(header)
    name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"}) or [""]))
    if not name:
        return header
    tensor = header[name]
    start, end = tensor["data_offsets"]
    dtype, size = draw(st.sampled_from([("F32", 4), ("I32", 4), ("I64", 8), ("F64", 8), ("BF16", 2), ("BOOL", 1),
                                        ("U8", 1), ("F8_E4M3", 1), ("U64", 8), ("I16", 2)]))  # fmt: skip
    count = (end - start) // size
    shape = draw(st.sampled_from([[count], [1, count], [count, 1], [], [0], [HUGE, 0], [count, HUGE]]))
    return {**header, name: {**tensor, "dtype": dtype, "shape": shape}}


# --- checks of loaders -----------------------------------------------------------------------------------------------


def check(load: Callable[[], object], path: Path, *, names: str | None = None) -> object | None:
    """Load a damaged file and return the result, or None if it was rejected.

    A rejection must be an ``AdapeftError`` that names the file. Loading must not run code, write files in the folder of
    the file or beside that folder, or use much memory or time.
    """
    before = _files_around(path)
    try:
        with _watched():
            found = load()
    except AdapeftError as error:
        found, said = None, str(error)
    else:
        said = path.name
    assert re.search(names or re.escape(path.name), said) or found is not None, f"does not name {path.name}: {said}"
    assert _files_around(path) == before
    return found


def _files_around(path: Path) -> set[Path]:
    return set(path.parent.parent.rglob("*"))


_WATCHING = False
_SEEN: list[str] = []
_FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.mkdir", "os.rmdir"),
    *("os.link", "os.symlink", "os.truncate", "os.chmod", "subprocess.Popen", "pickle.find_class", "socket.connect"),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile", "ctypes.dlopen"),
}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHING:
        return
    if event in _FORBIDDEN:
        _SEEN.append(f"{event} {arguments}")
    elif event == "open" and len(arguments) > 2 and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _SEEN.append(f"writes {arguments[0]}")


sys.addaudithook(_audit)


@contextmanager
def _watched() -> Iterator[None]:
    """Fail if the block writes files, starts a process, unpickles, or takes over 1 GiB or 20 seconds."""
    global _WATCHING

    def late(*_: object) -> None:
        raise TimeoutError("hangs")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGALRM, late)
    _SEEN.clear()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    signal.alarm(SECONDS)
    _WATCHING = True
    try:
        yield
    finally:
        _WATCHING = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not _SEEN
