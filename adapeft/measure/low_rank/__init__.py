"""Measuring through windows of low rank, with the memory and the products of LoRA."""
