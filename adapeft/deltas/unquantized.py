"""The delta of a quantized base, for the checkpoint that was quantized while it was loaded."""

from __future__ import annotations

from dataclasses import replace

from transformers.pytorch_utils import Conv1D

from adapeft.deltas.base import Base
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.model.fingerprint import base_name, changed_names, difference_from, has_names
from adapeft.model.quantization import stored_quantization
from adapeft.model.structure import is_linear_layer
from adapeft.parts.change import Change
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.whole import Whole


def check_may_be_merged(delta: Delta, *, unquantized: bool) -> None:
    """Check that merging into an unquantized checkpoint is asked for if, and only if, the delta needs it.

    Raises:
        AdapeftError: it is not asked for, or the delta belongs to a base that is not quantized.
    """
    if delta.quantization and not unquantized:
        raise AdapeftError(
            f"the delta belongs to a base quantized to {delta.quantization}, into which nothing can be merged. Load "
            f"that base and call Delta.apply; or merge into its unquantized checkpoint by --unquantized (in Python "
            f"unquantized=True), which is another model than the one that was trained: compare their scores."
        )
    if unquantized and not delta.quantization:
        raise AdapeftError(
            "--unquantized (in Python unquantized=True): the delta was not trained on a quantized base. Leave it out."
        )


def for_unquantized(delta: Delta, base: Base) -> Delta:
    """Return the delta with the shapes of ``base``, the unquantized checkpoint of the base that it belongs to.

    A quantized layer has its weight as [out, in], also where the checkpoint has a Conv1D's [in, out].

    Raises:
        AdapeftError: ``base`` is quantized, or differs from the delta's base in more than the weights of linear layers.
    """
    found, structure = base.checkpoint, base.structure
    if stored := stored_quantization(base.config):
        raise AdapeftError(
            f"--model {str(found.folder)!r}: is itself quantized ({stored}), and --unquantized needs the checkpoint "
            f"that was quantized. Give that one."
        )
    if delta.digests is None:
        raise AdapeftError(
            "the delta has no digests of its base's parameters, by which --unquantized recognizes the checkpoint that "
            "was quantized. Get the file that the training wrote."
        )
    prefix = structure.base_model_prefix
    layers = {path: module for path, module in structure.named_modules() if is_linear_layer(module)}
    matrices = {base_name(f"{path}.weight", prefix) for path in layers}
    entries = list(found.entries(delta.new))
    differing = set(changed_names(delta.digests, entries))
    if (others := sorted(differing - matrices)) or not has_names(delta.digests, [name for name, *_ in entries]):
        which = f"They differ in {others[0]!r}." if others else difference_from(delta.digests, entries)
        raise AdapeftError(
            f"--model {str(found.folder)!r}: is not the checkpoint of the quantized base that the delta was trained "
            f"on. {which}"
        )
    conv1d = {f"{path}.weight" for path, layer in layers.items() if isinstance(layer, Conv1D)}
    # A layer that was not quantized has the digest of the checkpoint's.
    turned = {name for name in conv1d if base_name(name, prefix) in differing}
    changes = {name: _transposed(change) if name in turned else change for name, change in delta.changes.items()}
    return replace(delta, changes=changes)


def _transposed(change: Change) -> Change:
    """Return the change of the transposed matrix."""
    part = change.part
    shape = part.shape[::-1]
    if isinstance(part, Lora):
        return Change(replace(part, shape=shape, dim=1 - part.dim), change.values)
    positions, values = part.entries(change.values)
    if positions is None:  # a sum of deltas
        return Change(Whole(shape), values.view(part.shape).t().contiguous())
    moved, order = (positions % part.shape[1] * part.shape[0] + positions // part.shape[1]).sort()
    return Change(Elements(shape, moved), values[order])
