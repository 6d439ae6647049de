"""The command ``merge`` reports entries that are lost to rounding in a coarse dtype, and the remedy."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from tests.adapeft.model.test_rounding import counted, make, small_delta


def test_what_is_lost_is_noted_and_float32_keeps_it(command, tmp_path):
    base = make(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    delta = small_delta(base, 1e-5)
    delta.save(tmp_path / "delta")
    expected = counted(base, delta, torch.bfloat16)
    arguments = ("merge", tmp_path / "delta", "--model", tmp_path / "base", "--out")
    status, output, errors = command(*arguments, tmp_path / "coarse")
    assert (status, output) == (0, f"{tmp_path / 'coarse'}\n")
    said = " ".join(errors.split())
    assert f"{expected.lost:,} of the delta's {expected.entries:,} entries are lost" in said
    assert "--dtype float32" in said

    status, output, errors = command(*arguments, tmp_path / "fine", "--dtype", "float32")
    assert (status, output) == (0, f"{tmp_path / 'fine'}\n")
    assert "lost" not in errors
    assert {value.dtype for value in load_file(tmp_path / "fine" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "fine" / "config.json").read_text())["dtype"] == "float32"

    done = command(*arguments, tmp_path / "other", "--dtype", "int8")
    assert done.returncode == 2
    assert "--dtype int8: give one of float32, bfloat16, float16" in " ".join(done.stderr.split())

    done = command(*arguments, tmp_path / "other", "--evaluate", tmp_path / "no.yaml")
    assert done.returncode == 2
    assert "no.yaml" in done.stderr
    assert not (tmp_path / "other").exists()
