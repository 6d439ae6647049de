"""The config: its sections and keys, how it is read, and what its values mean. Imports no torch."""
