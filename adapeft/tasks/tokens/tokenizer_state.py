"""The state of a tokenizer on which the tokens of a text depend."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tokenizers
import transformers
import xxhash
from transformers import PreTrainedTokenizerBase

from adapeft.data.content import file_hash


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return what identifies the tokenizer's results: its content rather than its path, its class, and the versions.

    Args:
        tokenizer: tokenizer; a fast one forgets the truncation and padding of its last call, which the next one sets.
    """
    digest = xxhash.xxh3_128()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        digest.update(backend.to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(f"{path.name}\0{file_hash(path)}\0".encode())
    special = sorted(tokenizer.special_tokens_map.items())
    digest.update(repr((tokenizer.truncation_side, list(tokenizer.model_input_names), special)).encode())
    return {
        "content": digest.hexdigest(),
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
