"""Rank functions: measure, finetune, evaluate, validate. Imports no Ray."""
