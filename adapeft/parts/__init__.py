"""Parts of a subset in a model: leaves, LoRA, adapters, and what training has changed of them."""
