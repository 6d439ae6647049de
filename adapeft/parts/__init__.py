"""Parts of a subset in a model (leaves, LoRA, adapters) and their changes by training."""
