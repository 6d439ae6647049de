"""Writing and reading of PEFT adapters."""
