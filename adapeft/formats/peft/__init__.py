"""PEFT adapters, written and read."""
