"""LoRA: low-rank updates of every linear layer of the blocks."""
