"""A delta exported by the command and loaded by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftMixedModel, PeftModel
from torch import nn

from tests.support.checkpoints import adapeft


def through_peft(plain: nn.Module, delta: Path, base: Path, out: Path, task_type: str | None) -> nn.Module:
    """Export a delta of a base to PEFT's format, and load its one or two adapters on the plain model.

    Args:
        plain: the base model.
        delta: file of the delta.
        base: folder of the base.
        out: folder for the adapters.
        task_type: what one adapter says that it is for.
    """
    exported = adapeft("export", delta, "--to", "peft", "--model", base, "--out", out)
    assert exported.returncode == 0, exported.stderr
    folders = sorted(path.parent for path in out.rglob("adapter_config.json"))
    types = [json.loads((folder / "adapter_config.json").read_text())["task_type"] for folder in folders]
    if folders == [out]:
        assert types == [task_type]
        return PeftModel.from_pretrained(plain, out).eval()
    assert folders == [out / "lora", out / "shira"]
    assert types == [None, None], "PeftMixedModel knows no tasks"
    return with_two_adapters(plain, out).eval()


def with_two_adapters(plain: nn.Module, out: Path) -> PeftMixedModel:
    """Load the two adapters in ``out`` on the plain model."""
    loaded = PeftMixedModel.from_pretrained(plain, str(out / "shira"), "shira")
    loaded.load_adapter(str(out / "lora"), "lora")
    loaded.set_adapter(["shira", "lora"])
    return loaded
