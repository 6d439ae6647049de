"""Small pictures of colours, and a small random vision transformer with its image processor."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

COLOURS = ("blue", "green", "red")


def picture(colour: str, seed: int, mode: str = "RGB") -> bytes:
    """Return a PNG of a size of its own, whose pixels are mostly of one colour."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (*rng.integers(6, 20, 2), 3), dtype=np.uint8)
    pixels[..., ("red", "green", "blue").index(colour)] += 120
    written = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(written, "png")
    return written.getvalue()


def write_pictures(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Write pictures into ``folder``, and return rows with their names and colours."""
    rng, rows = random.Random(seed), []
    folder.mkdir(exist_ok=True)
    for number in range(count):
        colour = rng.choice(COLOURS)
        (folder / f"{number}.png").write_bytes(picture(colour, 1000 * seed + number))
        rows.append({"image": f"{folder.name}/{number}.png", "labels": colour})
    return rows


def write_vit(folder: Path, image_size: int = 8) -> Path:
    """Write a vision transformer without a head, for images of 8 pixels, and a processor for ``image_size``."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes, **dropout), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder
