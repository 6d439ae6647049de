"""Padding: one token and one side, on which the tokenizer and the model's config agree."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig, PreTrainedTokenizerBase


def with_padding(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that pads as the model of ``config`` expects, so that no batch changes an example.

    The token is that of the config, because classifiers such as GPT-2's look for the last token that is not
    ``config.pad_token_id``, and RoBERTa counts positions from it. If the model has no such token or the tokenizer
    cannot produce it, it is the tokenizer's padding token, its end-of-text token or token 0: the first of them that has
    an embedding in the model.

    The side is right: GPT-2 and others count positions from the left edge regardless of the mask, and state-space
    models process padding on the left. It is left for models that classify by the last position, such as XLNet.

    Args:
        tokenizer: tokenizer to copy; it is not changed.
        config: config of the model; None keeps the side, and the token if there is one.
    """
    tokenizer = copy.deepcopy(tokenizer)
    # Tokenizing once and padding later is intended here; the warning is about doing so by oversight.
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    own = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    if config is None:
        size, wanted = None, own
    else:
        text_config = config.get_text_config()
        size, wanted = getattr(text_config, "vocab_size", None), [getattr(text_config, "pad_token_id", None), *own]
        tokenizer.padding_side = "left" if getattr(config, "summary_type", None) == "last" else "right"
    for number in wanted:
        # Some old models have -1 for no token, and others lists.
        if type(number) is int and number >= 0 and (size is None or number < size):
            token = tokenizer.convert_ids_to_tokens(number)
            if token is not None and tokenizer.convert_tokens_to_ids(token) == number:
                if number != tokenizer.pad_token_id:
                    tokenizer.pad_token = token
                return tokenizer
    raise AssertionError("token 0 is a token of every tokenizer")


def set_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the config's padding token to that of a tokenizer from ``with_padding``."""
    for part in (config, config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
