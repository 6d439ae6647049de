"""Full fine-tuning: what every budget is compared with."""
