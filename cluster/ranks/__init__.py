"""What a rank does: measure, finetune, evaluate, validate. Imports no Ray."""
