"""Roles, layers and kinds of a model's parameters, derived from its module tree and not from a table of model names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeGuard

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.model.dense import logical_shape
from adapeft.model.quantized import quantized_weights

MISSING = "adapeft_missing"
"""Attribute of a loaded model with the names of the parameters that were missing from its checkpoint."""

_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks with which torch's older functions recompute a weight before each forward pass."""


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of a model; a tied one appears once, under the first of its names.

    Attributes:
        name: qualified name, as in ``model.named_parameters()``.
        shape: full shape, also under ZeRO-3 and for packed weights.
        role: name without its place in the block list, shared by all layers (``attention.self.query.weight``).
        layer: index in the outermost block list, -1 outside of any.
        depth: relative depth in [0, 1]; 0 before the blocks and 1 after them.
        output_dim: dimension of the output neurons of a matrix (0 for ``nn.Linear`` and embeddings, 1 for ``Conv1D``);
            None for parameters that are not matrices and have no rows.
        is_linear: whether it is the weight of exactly one linear layer, not tied.
        output_of: the sublayer whose output projection it is, if any.
        is_quantized: whether bitsandbytes has quantized it, so that it has no gradient of its own.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int
    depth: float
    output_dim: int | None
    is_linear: bool = False
    output_of: Literal["attention", "feed-forward"] | None = None
    is_quantized: bool = False

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


def describe_parameters(model: nn.Module) -> tuple[ParameterInfo, ...]:
    """Describe the parameters of ``model`` in the order of ``named_parameters()``, tied ones once."""
    block_lists = _outermost_block_lists(model)
    names = [name for name, _ in model.named_parameters()]
    first_block = {
        prefix: next((i for i, name in enumerate(names) if name.startswith(prefix + ".")), len(names))
        for prefix in block_lists
    }
    num_uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    quantized = quantized_weights(model)
    described = []
    for position, (name, parameter) in enumerate(model.named_parameters()):
        owner, _, local_name = name.rpartition(".")
        shape = logical_shape(model.get_submodule(owner), local_name)
        role, layer, depth = _place(name, position, block_lists, first_block)
        is_layer = local_name == "weight" and is_called_layer(model, owner)
        output_dim = _output_dim(model, name, len(shape))
        is_linear = is_layer and num_uses[id(parameter)] == 1
        is_quantized = name in quantized
        described.append(
            ParameterInfo(name, shape, role, layer, depth, output_dim, is_linear, is_quantized=is_quantized)
        )
    outputs = _output_projections(described)
    return tuple(replace(info, output_of=outputs.get(info.name)) for info in described)


def is_linear_layer(module: nn.Module | None) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a linear layer that the model calls.

    ``nn.MultiheadAttention`` reads the weight of its output projection and never calls the layer, so anything that
    changes a layer's output would have no effect there.
    """
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)


def is_called_layer(model: nn.Module, path: str) -> bool:
    """Whether ``path`` is a linear layer that is called with every choice of kernels.

    With fused kernels installed, a state-space mixer (Mamba's, with A_log and D) calls only its input projection and
    passes the weights of its other layers to the kernels.
    """
    parent, _, name = path.rpartition(".")
    mixer = model.get_submodule(parent)
    is_read = hasattr(mixer, "A_log") and hasattr(mixer, "D") and name != "in_proj"
    return is_linear_layer(model.get_submodule(path)) and not is_read


def new_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that a checkpoint of the base model does not hold: the new head.

    For a model from ``load_model`` these are the parameters missing from its checkpoint. Otherwise none are new if the
    class of ``model`` wrote the checkpoint (``config.architectures``); any other checkpoint was written by the base
    model or with another head, so everything outside ``model.base_model`` is new.
    """
    missing = getattr(model, MISSING, None)
    if missing is not None:
        return missing
    architectures = getattr(getattr(model, "config", None), "architectures", None) or []
    prefix = getattr(model, "base_model_prefix", "")
    if type(model).__name__ in architectures or not prefix or not hasattr(model, prefix):
        return ()
    return tuple(name for name, _ in model.named_parameters() if not name.startswith(prefix + "."))


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Return a mapping from every parameter name to the first name of that parameter; a tied one has several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def unsaved_parameters(model: nn.Module) -> frozenset[str]:
    """Return the parameters that the model's class leaves out of its checkpoints, such as Marian's position tables.

    ``from_pretrained`` recomputes them, so any training of them is lost.
    """
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())


def reparametrized(model: PreTrainedModel) -> str:
    """Return the path of a module that computes a weight from other parameters, unlike in the model's own class.

    ``from_pretrained`` initializes such a weight at random. Classes that normalize weights themselves (Wav2Vec2's
    positional convolution) load them correctly. Empty if there is no such module.
    """
    computing = [path for path, module in model.named_modules() if is_parametrized(module) or _has_hook(module)]
    if not computing:
        return ""
    with torch.device("meta"):
        plain = dict(type(model)(deepcopy(model.config)).named_modules())
    for path in computing:
        module, own = model.get_submodule(path), plain.get(path)
        names = {name for name, _ in own.named_parameters()} if own is not None else set()
        if not names <= {name for name, _ in module.named_parameters()}:
            return path
    return ""


def _has_hook(module: nn.Module) -> bool:
    return any(isinstance(hook, _HOOKS) for hook in module._forward_pre_hooks.values())


def always_trained(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the parameter names that ``select.always_train`` matches; the pattern ``auto`` stands for a new head.

    Raises:
        AdapeftError: a pattern matches nothing.
    """
    explicit = [pattern for pattern in patterns if pattern != "auto"]
    matched = match_patterns("select.always_train", explicit, parameter_names(model))
    return matched | (set(new_parameters(model)) if "auto" in patterns else set())


def match_patterns(field: str, patterns: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """Return the parameters matched by any of the shell-style ``patterns``, by the first of their names.

    Args:
        field: key of the config, for the message.
        patterns: patterns, matched against every name of a tied weight.
        names: mapping from ``parameter_names``.

    Raises:
        AdapeftError: a pattern matches nothing; the message has ``field`` and the closest parameter names.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = {first for name, first in names.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise AdapeftError(_matches_nothing(field, pattern, list(names)))
        matched |= hits
    return matched


def _matches_nothing(field: str, pattern: str, names: list[str]) -> str:
    words = {part for name in names for part in name.split(".") if not part.isdigit()}
    hint = did_you_mean(pattern.strip("*"), names) or did_you_mean(pattern.strip("*."), sorted(words))
    example = names[len(names) // 2] if names else "nothing"
    return (
        f"{field}: the pattern {pattern!r} matches no parameter.{hint} Patterns match whole names such as {example!r};"
        f" put '*' around a part of a name."
    )


def _output_projections(parameters: Sequence[ParameterInfo]) -> dict[str, Literal["attention", "feed-forward"]]:
    """Return the output projections of each block's attention and feed-forward network, as name → sublayer.

    An output projection is the last linear layer of the sublayer that maps back to the block's width. Attention layers
    have ``attn`` or ``attention`` in their path. The feed-forward networks of a mixture of experts have no single
    output and are left out.
    """
    blocks: dict[str, list[ParameterInfo]] = {}
    for info in parameters:
        if info.is_linear and info.layer >= 0:
            blocks.setdefault(info.name.removesuffix(info.role), []).append(info)
    found: dict[str, Literal["attention", "feed-forward"]] = {}
    for layers in blocks.values():
        width = layers[0].shape[1 - (layers[0].output_dim or 0)]
        back = [info for info in layers if info.shape[info.output_dim or 0] == width]
        attention = [info for info in back if re.search("attn|attention", info.role.lower())]
        rest = [info for info in back if info not in attention]
        if attention:
            found[attention[-1].name] = "attention"
        places = Counter(re.sub(r"\d+", "*", info.role) for info in rest)
        if rest and places[re.sub(r"\d+", "*", rest[-1].role)] == 1:
            found[rest[-1].name] = "feed-forward"
    return found


def _outermost_block_lists(model: nn.Module) -> dict[str, int]:
    """Return prefix → length of every block list that is not inside another one."""
    lists: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if _is_block_list(module) and not any(prefix.startswith(outer + ".") for outer in lists):
            lists[prefix] = len(module)
    return lists


def _is_block_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """Whether a module is a numbered list of modules of one class, or of blocks of several classes.

    The blocks of a hybrid model (alternating attention and state-space layers) have different classes and contain
    modules themselves; a list of single layers of several classes is one network.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential) or next(module.parameters(), None) is None:
        return False
    # A parametrization is also a list, with its own parameters; a Sequential may have named modules.
    if module._parameters or not all(name.isdigit() for name in module._modules):
        return False
    if len({type(block) for block in module}) == 1:
        return True
    blocks = [block for block in module if next(block.parameters(), None) is not None]
    return isinstance(module, nn.ModuleList) and all(next(block.children(), None) is not None for block in blocks)


def _place(
    name: str, position: int, block_lists: dict[str, int], first_block: dict[str, int]
) -> tuple[str, int, float]:
    """Return (role, layer, relative depth) of a parameter."""
    for prefix, length in block_lists.items():
        if name.startswith(prefix + "."):
            index, _, role = name[len(prefix) + 1 :].partition(".")
            layer = int(index)
            return role, layer, layer / (length - 1) if length > 1 else 0.5
    before = any(position < first for first in first_block.values())
    return name, -1, 0.0 if before else 1.0


def _output_dim(model: nn.Module, name: str, ndim: int) -> int | None:
    if ndim != 2:
        return None
    owner, _, _ = name.rpartition(".")
    return 1 if isinstance(model.get_submodule(owner), Conv1D) else 0
