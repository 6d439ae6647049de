"""Whether what ``attach`` froze has stayed as it was."""

from __future__ import annotations

import torch
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.model.divided import is_divided
from adapeft.model.fingerprint import base_name, changed_names, entry_of
from adapeft.tune.attachment import Attachment


def check_frozen(model: nn.Module, attachment: Attachment) -> None:
    """Checks that the frozen parameters which this process holds whole have the values of the base.

    By samples, as the fingerprint: an optimizer of somebody's own, or a module that writes to a parameter in its
    forward, changes many entries. Parameters in float16 are left out, for a cast to it rounds the samples twice.

    Raises:
        AdapeftError: others were changed, which a delta would leave out.
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
            f"{changed[0]!r} (and {len(changed) - 1} more) was frozen by adapeft.attach, and has other values or "
            f"another shape now: it was loaded or resized since, an optimizer of its own trains it, or a module writes "
            f"to it in its forward. A delta would leave that out. Load and resize the model before adapeft.attach, and "
            f"train this parameter with the subset (select's always_train) or keep it as it was."
        )
