"""Subcommands of ``adapeft``, one file or folder each."""
