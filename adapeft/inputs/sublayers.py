"""Where the sublayers of a transformer's blocks end, told by shapes and order and not by a table of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from adapeft.errors import AdapeftError
from adapeft.inputs.structure import ParameterInfo


def sublayer_outputs(parameters: Iterable[ParameterInfo]) -> list[tuple[ParameterInfo, ParameterInfo]]:
    """Weights of the last linear layers of every block's attention and of its feed-forward.

    The feed-forward ends in the block's last linear layer that leads from another width back to the model's; it begins
    with the first that leads to that width, and attention ends before it.

    Args:
        parameters: of the model, in its order.

    Raises:
        AdapeftError: a block has no such layers.
    """
    linear = [info for info in parameters if info.is_linear and info.layer >= 0]
    found = []
    for block, infos in groupby(linear, key=lambda info: info.name.removesuffix(info.role)):
        ends = _ends(list(infos))
        if ends is None:
            raise AdapeftError(
                f"no attention followed by a feed-forward is to be found in {block.rstrip('.')!r}: adapters have no "
                f"place there. Choose another method, such as lora."
            )
        found.append(ends)
    if not found:
        raise AdapeftError("the model has no blocks of linear layers: adapters have no place. Choose another method.")
    return found


def _ends(block: Sequence[ParameterInfo]) -> tuple[ParameterInfo, ParameterInfo] | None:
    width = _inputs(block[0])
    back = [i for i, info in enumerate(block) if _outputs(info) == width != _inputs(info)]
    if not back:
        return None
    last = back[-1]
    first = next((i for i, info in enumerate(block) if _outputs(info) == _inputs(block[last])), last)
    attention = [info for info in block[:first] if _outputs(info) == width]
    return (attention[-1], block[last]) if attention else None


def _outputs(info: ParameterInfo) -> int:
    assert info.output_dim is not None
    return info.shape[info.output_dim]


def _inputs(info: ParameterInfo) -> int:
    assert info.output_dim is not None
    return info.shape[1 - info.output_dim]
