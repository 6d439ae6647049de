"""Checks that parameters are dense floating-point tensors in memory, whose elements can be read and changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adapeft.errors import AdapeftError
from adapeft.model.divided import shape_of
from adapeft.model.quantized import quantized_weights

_NEEDS_GRADIENTS = ("select", "attach")
"""Public functions that need gradients of the model's parameters."""

_STRUCTURE_DOES = ("attach", "detach")
"""Public functions that accept a model without weights, on the meta device."""


def check_resident(model: nn.Module, call: str) -> None:
    """Check that the parameters of ``model`` are in memory and can have gradients.

    Args:
        model: model without wrappers.
        call: name of the public function that it was passed to, for the messages.

    Raises:
        AdapeftError: a parameter has no shape or no values yet, is offloaded, or was created in inference mode.
    """
    if call in _NEEDS_GRADIENTS and torch.is_inference_mode_enabled():
        raise AdapeftError(
            f"adapeft.{call}: torch.inference_mode() is active, so there are no gradients. Call it outside."
        )
    parameters = dict(model.named_parameters())
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise AdapeftError(
                f"adapeft.{call}: {name!r} belongs to a lazy module and has no shape yet. Run one batch through the "
                f"model first."
            )
    _check_not_offloaded(model, call)
    without = [name for name, parameter in parameters.items() if parameter.is_meta]
    if without and not (len(without) == len(parameters) and call in _STRUCTURE_DOES):
        raise AdapeftError(
            f"adapeft.{call}: {len(without)} of {len(parameters)} parameters are on the meta device and have no "
            f"values, such as {without[0]!r}. Load the model with all of its weights in memory."
        )
    for name, parameter in parameters.items():
        if parameter.is_inference():
            raise AdapeftError(
                f"adapeft.{call}: the parameter {name!r} was created in torch.inference_mode(), so it cannot have a "
                f"gradient. Load the model outside of it."
            )


def obstacles(model: nn.Module) -> dict[str, str]:
    """Return name → reason for every parameter whose elements cannot be read and changed one by one."""
    found = {name: obstacle(parameter) for name, parameter in model.named_parameters()}
    found |= {name: f"is quantized ({kind})" for name, kind in quantized_weights(model).items() if not found[name]}
    return {name: reason for name, reason in found.items() if reason}


def obstacle(tensor: Tensor) -> str:
    """Return the reason why the elements of a tensor cannot be read and changed one by one; empty if they can."""
    if isinstance(tensor, DTensor):
        return ""
    packed = isinstance(tensor, nn.Parameter) and type(tensor).__name__ not in ("Parameter", "FakeTensor")
    if packed or is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, whose elements are packed"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout})"
    if tensor.is_complex() or not tensor.is_floating_point() or tensor.element_size() == 1:
        return f"holds {tensor.dtype}, which is quantized or has no gradient"
    if not tensor.is_meta and _overlaps_itself(tensor):
        return f"has elements that share memory (strides {tuple(tensor.stride())} of an expanded tensor)"
    return ""


def check_dense(call: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the elements of the named parameters can be changed by a subset or delta.

    Raises:
        AdapeftError: a parameter cannot be changed; the message gives the reason and the remedy.
    """
    for name, tensor in tensors:
        reason = obstacle(tensor)
        if reason:
            raise AdapeftError(
                f"adapeft.{call}: the parameter {name!r} {reason}, so it cannot be changed. Load the base as dense "
                f"float32, bfloat16 or float16 without quantization, or leave this parameter out with select.exclude."
            )


def logical_shape(owner: nn.Module, name: str) -> tuple[int, ...]:
    """Return the full, unpacked shape of the parameter ``name`` of ``owner``, also under ZeRO-3.

    bitsandbytes packs two four-bit weights into each byte of a column.
    """
    parameter = owner.get_parameter(name)
    if name == "weight" and isinstance(owner, nn.Linear) and obstacle(parameter):
        return owner.out_features, owner.in_features
    return shape_of(parameter)


def logical_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name → ``logical_shape`` of every parameter of ``model``."""
    places = {name: name.rpartition(".") for name, _ in model.named_parameters()}
    return {name: logical_shape(model.get_submodule(owner), local) for name, (owner, _, local) in places.items()}


def _check_not_offloaded(model: nn.Module, call: str) -> None:
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(one, "offload", False) for one in hooks):
            name = next((name for name, _ in module.named_parameters(prefix=path)), path)
            raise AdapeftError(
                f"adapeft.{call}: {name!r} is offloaded by accelerate, which loads it only during the forward pass. "
                f"Load the model without offloading: device_map={{'': 0}} or 'cpu', no cpu_offload or disk_offload. If "
                f"it does not fit, use a smaller dtype or more memory."
            )


def check_own_memory(model: nn.Module, call: str) -> None:
    """Check that no two parameters share memory: the forward pass would see them tied, the optimizer separate.

    Raises:
        AdapeftError: two parameters share memory.
    """
    spans = [
        (str(parameter.device), start, start + _span(parameter) * parameter.element_size(), name, parameter)
        for name, parameter in model.named_parameters()
        if not parameter.is_meta
        and parameter.numel()
        and not isinstance(parameter, DTensor)
        and not obstacle(parameter)
        for start in [parameter.data_ptr()]
    ]
    reaching: list[tuple[str, int, int, str, Tensor]] = []
    for span in sorted(spans, key=lambda span: span[:2]):  # stable: spans with the same start stay in the model's order
        device, start, _, name, parameter = span
        reaching = [other for other in reaching if other[0] == device and other[2] > start]
        for *_, other_name, other in reaching:
            if _share_elements(other, parameter):
                raise AdapeftError(
                    f"adapeft.{call}: {other_name!r} and {name!r} are two parameters that share memory, so a change of "
                    f"one silently changes the other. Tie them as one parameter (model.tie_weights()), or give each "
                    f"its own copy (parameter.data = parameter.data.clone())."
                )
        reaching.append(span)


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose memory spans overlap have an element in common.

    The columns of one matrix have overlapping spans but no common elements.
    """
    if first.data_ptr() == second.data_ptr() or (first.is_contiguous() and second.is_contiguous()):
        return True
    addresses = (
        torch.arange(_span(tensor)).as_strided(tensor.shape, tensor.stride()) * tensor.element_size()
        + tensor.data_ptr()
        for tensor in (first, second)
    )
    return bool(torch.isin(*addresses).any())


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether a strided tensor spans less memory than it has elements."""
    return _span(tensor) < math.prod(tensor.shape)


def _span(tensor: Tensor) -> int:
    """Return the number of elements of memory that a strided tensor spans."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
