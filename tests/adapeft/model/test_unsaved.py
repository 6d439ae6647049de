"""Tests of parameters that a model's class leaves out of its checkpoints: not candidates, and refused when saving."""

from __future__ import annotations

import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from adapeft import AdapeftError, attach
from adapeft.measure.groups import build_groups
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset

POSITIONS = "model.decoder.embed_positions.weight"


def make_marian() -> MarianMTModel:
    torch.manual_seed(0)
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIZES.items()}
    return MarianMTModel(MarianConfig(vocab_size=37, d_model=16, max_position_embeddings=16, pad_token_id=1, **sides))


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def test_they_are_no_candidates():
    with pytest.warns(UserWarning, match=r"2 parameters are left out.*'model.decoder.embed_positions.weight'"):
        groups = build_groups(make_marian(), "element")
    names = {info.name for info in groups.parameters}
    assert "model.decoder.layers.0.fc1.weight" in names
    assert not any("embed_positions" in name for name in names)


@pytest.mark.parametrize("part", [Whole((16, 16)), Rows((16, 16), torch.tensor([3]))], ids=lambda part: part.kind)
def test_a_trained_one_is_not_saved_as_if_it_were(part, tmp_path):
    model = attach(make_marian(), Subset({POSITIONS: part}))
    with pytest.raises(AdapeftError, match=rf"does not write '{POSITIONS}' to its checkpoints"):
        model.save_pretrained(tmp_path)
