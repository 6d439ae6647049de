"""Artifacts are whole or absent, and name their kind."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from adapeft import AdapeftError
from adapeft.files import artifact
from adapeft.files.artifact import (
    load_table,
    load_tensors,
    new_folder,
    provenance,
    replacing,
    save_json,
    save_table,
    save_tensors,
)
from tests.support.processes import FORKS


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.json"
    save_json(path, {"a": 1})

    def fail() -> None:
        with replacing(path) as temporary:
            assert temporary.parent == path.parent, "a rename does not cross file systems"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["file.json"]
    with pytest.raises(TypeError):
        save_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_files_are_as_readable_as_any_other(tmp_path):
    old = os.umask(0o027)
    try:
        save_json(tmp_path / "file.json", {})
        with new_folder(tmp_path / "folder") as temporary:
            save_file({"a": torch.ones(1)}, temporary / "t")
    finally:
        os.umask(old)
    for path in ("file.json", "folder/t"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o640


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "out") as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").touch()
    with pytest.raises(AdapeftError, match=r"--out .*out: not an empty folder"):
        fail()


def test_provenance_where_git_is_not_installed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance.__wrapped__() == {**provenance(), "revision": None}


def test_provenance_in_an_environment_within_another_checkout(tmp_path, monkeypatch):
    """The revision of the project that adapeft is installed for is not that of adapeft."""

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    installed = tmp_path / "environment" / "artifact.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(artifact, "__file__", str(installed))
    assert provenance.__wrapped__()["revision"] is None
    git("add", "environment")
    git("commit", "-m", "vendored")
    assert provenance.__wrapped__()["revision"] == git("rev-parse", "--short", "HEAD")


def test_tensors_carry_kind_description_and_provenance(tmp_path):
    path = tmp_path / "t"
    tensor = torch.arange(6).view(2, 3)
    save_tensors(path, "subset", {"a": tensor, "b": tensor.t()}, {"seed": 3, "kind": "mine", "provenance": "mine"})
    tensors, description = load_tensors(path, "subset")
    assert torch.equal(tensors["a"], tensor)
    assert torch.equal(tensors["b"], tensor.t())
    assert description == {"seed": 3, "provenance": provenance()}
    assert provenance()["versions"]["torch"] == torch.__version__


def test_tensors_of_another_kind_or_none_are_refused(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, "subset", {"a": torch.zeros(2)}, {})
    with pytest.raises(AdapeftError, match="holds another kind of artifact: expected a delta"):
        load_tensors(path, "delta")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapeftError, match="is not a subset, or it is truncated"):
        load_tensors(path, "subset")
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(AdapeftError, match="not one of adapeft's"):
        load_tensors(path, "subset")
    for header, message in (("{", "is not a subset, or it is truncated"), ("[]", "another kind")):
        save_file({"a": torch.zeros(2)}, path, metadata={"adapeft": header})
        with pytest.raises(AdapeftError, match=message):
            load_tensors(path, "subset")
    with pytest.raises(AdapeftError, match="no such file; expected a subset"):
        load_tensors(tmp_path, "subset")


def test_tables(tmp_path):
    path = tmp_path / "groups.parquet"
    table = pa.table({"count": [1, 2, 3]}).replace_schema_metadata({"granularity": "row"})
    save_table(path, table)
    assert load_table(path).equals(table, check_metadata=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapeftError, match="is not a Parquet table, or it is truncated"):
        load_table(path)
    with pytest.raises(AdapeftError, match="no such file; expected a Parquet table"):
        load_table(tmp_path / "missing")


def _load_with_every_bit_of_the_footer_flipped(path: Path) -> None:
    content = path.read_bytes()
    for place in range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with suppress(AdapeftError):
                load_table(path)


def test_no_damaged_footer_aborts_the_process(tmp_path):
    """These include histogram sizes that do not fit their column, which crash pyarrow's own accessor."""
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6.0)), 2)
    save_table(tmp_path / "table", pa.table({"slope": np.arange(3.0), "projections": pairs}))
    process = FORKS.Process(target=_load_with_every_bit_of_the_footer_flipped, args=(tmp_path / "table",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_texts_are_utf_8_whatever_the_locale(tmp_path):
    program = (
        "import sys; from pathlib import Path; from adapeft.files.artifact import save_text; "
        "from adapeft.files.damage import load_json; path = Path(sys.argv[1]); "
        "save_text(path, '{\"mean \\u00b1 std\": 1}'); load_json(path, '', '')"
    )
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path / "report")]
    subprocess.run(command, env=os.environ | ascii_locale, check=True, timeout=900)
    assert (tmp_path / "report").read_bytes() == '{"mean ± std": 1}'.encode()
