"""Which parameters are dense floating-point numbers in memory, of which single elements can be read and changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adapeft.errors import AdapeftError

_NEEDS_GRADIENTS = ("select", "attach")
"""Calls whose tensors are to have gradients."""

_STRUCTURE_DOES = ("attach", "detach")
"""Calls that a model without any weights, on the meta device, may be passed to."""


def check_resident(model: nn.Module, call: str) -> None:
    """Checks that the parameters of ``model`` are in memory and open to gradients.

    Args:
        model: without wrappers.
        call: the public function that it was passed to, for the messages.

    Raises:
        AdapeftError: a parameter has no shape or no values yet, is offloaded, or was made in inference mode.
    """
    if call in _NEEDS_GRADIENTS and torch.is_inference_mode_enabled():
        raise AdapeftError(f"adapeft.{call}: within torch.inference_mode() nothing has a gradient. Call it outside.")
    parameters = dict(model.named_parameters())
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise AdapeftError(
                f"adapeft.{call}: {name!r} of a lazy module has no shape yet. Run one batch through the model first."
            )
    _check_not_offloaded(model, call)
    without = [name for name, parameter in parameters.items() if parameter.is_meta]
    if without and not (len(without) == len(parameters) and call in _STRUCTURE_DOES):
        raise AdapeftError(
            f"adapeft.{call}: {len(without)} of {len(parameters)} parameters are on the meta device, without values, "
            f"such as {without[0]!r}. Load the model with its weights, all of them in memory."
        )
    for name, parameter in parameters.items():
        if parameter.is_inference():
            raise AdapeftError(
                f"adapeft.{call}: the parameter {name!r} was made under torch.inference_mode(), so it can have no "
                f"gradient. Load the model outside of it."
            )


def obstacles(model: nn.Module) -> dict[str, str]:
    """Name → why the elements of a parameter cannot be read and changed one by one, for each that it is true of."""
    found = {name: obstacle(parameter) for name, parameter in model.named_parameters()}
    return {name: reason for name, reason in found.items() if reason}


def obstacle(tensor: Tensor) -> str:
    """Why the elements of a tensor cannot be read and changed one by one; empty where they can."""
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
    """Checks that the named parameters that a subset or a delta changes can be changed.

    Raises:
        AdapeftError: one cannot; names it, the reason and the remedy.
    """
    for name, tensor in tensors:
        reason = obstacle(tensor)
        if reason:
            raise AdapeftError(
                f"adapeft.{call}: the parameter {name!r} {reason}, so it cannot be changed. Load the base in float32, "
                f"bfloat16 or float16 (without quantization, dense), or leave this parameter out with select.exclude."
            )


def logical_shape(owner: nn.Module, name: str) -> tuple[int, ...]:
    """Shape of the weights that the parameter ``name`` of ``owner`` stands for: whole under ZeRO-3, unpacked.

    bitsandbytes packs two weights of four bits into each byte of a column.
    """
    parameter = owner.get_parameter(name)
    if name == "weight" and isinstance(owner, nn.Linear) and obstacle(parameter):
        return owner.out_features, owner.in_features
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_not_offloaded(model: nn.Module, call: str) -> None:
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(one, "offload", False) for one in hooks):
            name = next((name for name, _ in module.named_parameters(prefix=path)), path)
            raise AdapeftError(
                f"adapeft.{call}: {name!r} is offloaded by accelerate, which loads it for the length of a forward pass "
                f"alone. Load the model without offloading: device_map={{'': 0}} or 'cpu', no cpu_offload or "
                f"disk_offload, with a smaller dtype or more memory if it does not fit."
            )


def check_own_memory(model: nn.Module, call: str) -> None:
    """Checks that no two parameters share memory, tied for the forward pass and apart for every optimizer.

    Raises:
        AdapeftError: two do.
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
    for span in sorted(spans, key=lambda span: span[:2]):  # stable: of two that begin together, the model's first
        device, start, _, name, parameter = span
        reaching = [other for other in reaching if other[0] == device and other[2] > start]
        for *_, other_name, other in reaching:
            if _share_elements(other, parameter):
                raise AdapeftError(
                    f"adapeft.{call}: the parameters {other_name!r} and {name!r} share their memory and are two "
                    f"parameters, so changing one changes the other unseen. Tie them as one parameter "
                    f"(model.tie_weights()), or give each a copy of its own (parameter.data = parameter.data.clone())."
                )
        reaching.append(span)


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, whose memory reaches over a common stretch, have an element in common.

    The columns of one matrix reach over the same stretch and share none.
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
    """Whether a strided tensor reaches over less memory than it has elements."""
    return _span(tensor) < math.prod(tensor.shape)


def _span(tensor: Tensor) -> int:
    """Over how many elements of its memory a strided tensor reaches."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
