"""Check that the parameters frozen by ``attach`` are unchanged."""

from __future__ import annotations

import torch
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.model.divided import is_divided
from adapeft.model.fingerprint import base_name, changed_names, entry_of
from adapeft.tune.attachment import Attachment


def check_frozen(model: nn.Module, attachment: Attachment) -> None:
    """Check that the frozen parameters that this process holds whole have the values of the base.

    Like the fingerprint, this compares samples: a separate optimizer, or a module that writes to a parameter in its
    forward, changes many entries. Parameters in float16 are skipped, because a cast to it rounds the samples twice.

    Raises:
        AdapeftError: frozen parameters were changed, which a delta would not contain.
    """
    if attachment.digests is None:
        return
    prefix = getattr(model, "base_model_prefix", "")
    trained = {id(parameter) for parameter in attachment.trained.values()}
    entries = (
        entry_of(base_name(path.replace(".base_layer.", "."), prefix), parameter)
        for path, parameter in model.named_parameters()
        if id(parameter) not in trained
        and parameter.numel()
        and not parameter.is_meta
        and not is_divided(parameter)
        and parameter.dtype != torch.float16
    )
    changed = changed_names(attachment.digests, entries)
    if changed:
        raise AdapeftError(
            f"{changed[0]!r} (and {len(changed) - 1} more) was frozen by adapeft.attach, but its values or shape have "
            f"changed: it was loaded or resized since, a separate optimizer trains it, or a module writes to it in its "
            f"forward. A delta would not contain that change. Load and resize the model before adapeft.attach, and "
            f"train this parameter with the subset (select's always_train) or leave it unchanged."
        )
