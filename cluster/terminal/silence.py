"""Keeps libraries from writing to the terminal."""

from __future__ import annotations


def silence_libraries() -> None:
    """Silence warnings and transformers' messages: the ranks' logs hold them, and this terminal is for progress."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
