"""Tokens of the examples: tokenizing a split once per machine, and packing examples into rows."""
