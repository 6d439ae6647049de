"""The sections of a config, one class each; importing them does not import torch."""
