"""Full fine-tuning: the reference for every budget."""
