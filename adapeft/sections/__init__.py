"""The sections of a config, each a class of its own, without torch."""
