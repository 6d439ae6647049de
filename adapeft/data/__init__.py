"""Examples: where they come from, what their columns hold, and batches of them."""
