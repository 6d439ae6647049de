"""What other libraries put around and into a model, and the bare model inside."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from adapeft.errors import AdapeftError
from adapeft.model.dense import check_own_memory, check_resident
from adapeft.model.divided import is_divided
from adapeft.model.fingerprint import base_name

ATTACHMENT = "adapeft_attachment"
"""Attribute of a model that a subset is attached to."""

_INSIDE: dict[type[nn.Module], str] = {
    OptimizedModule: "_orig_mod",
    ActivationWrapper: "_checkpoint_wrapped_module",
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    DistributedDataParallel: "module",
    DataParallel: "module",
    AveragedModel: "module",
}
"""Wrapper → the attribute that holds what it wraps."""

_OTHER_WRAPPERS = ("base_model", "model")
"""Further attributes under which wrappers hold a model, in checkpoints: those of PEFT and Lightning."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around it.

    Raises:
        AdapeftError: PEFT has wrapped it, which changes what it computes.
    """
    while (attribute := _wrapped_as(model)) is not None:
        model = getattr(model, attribute)
    if isinstance(model, PeftModel | PeftMixedModel):
        raise AdapeftError(
            f"the model is a {type(model).__name__}: PEFT has put its own layers into it and frozen everything else, "
            f"an attached subset too. {_PEFT_REMEDY}"
        )
    return model


def bare(model: nn.Module, call: str) -> nn.Module:
    """The model inside the wrappers around it, in which every parameter is whole and has its own name.

    Args:
        model: what the user passed.
        call: the public function that it was passed to, for the messages.

    Raises:
        AdapeftError: something has divided its parameters, or has put layers or wrappers of its own inside.
    """
    inner = unwrap(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise AdapeftError(
            f"adapeft.{call}: the model is sharded by FullyShardedDataParallel. Call adapeft.{call} first and shard "
            f"the model afterwards."
        )
    for name, parameter in inner.named_parameters():
        if is_divided(parameter):
            raise AdapeftError(
                f"adapeft.{call}: the parameter {name!r} is divided over ranks ({is_divided(parameter)}). Call "
                f"adapeft.{call} on the whole model first and shard it afterwards: load it before the DeepSpeed "
                f"configuration exists, attach, and only then call fully_shard, deepspeed.initialize or the Trainer."
            )
    for path, module in inner.named_modules():
        if isinstance(module, BaseTunerLayer) and not hasattr(inner, ATTACHMENT):
            raise AdapeftError(
                f"adapeft.{call}: {path!r} is a layer of PEFT ({type(module).__name__}), so the model is not the base "
                f"that it was made from. {_PEFT_REMEDY}"
            )
        if _wrapped_as(module) is not None:
            raise AdapeftError(
                f"adapeft.{call}: the module {path!r} inside the model is wrapped in {type(module).__name__}, which "
                f"changes the names of its parameters. Call adapeft.{call} first and wrap the module afterwards."
            )
    check_resident(inner, call)
    check_own_memory(inner, call)
    return inner


def name_inside(name: str) -> str:
    """The name in the bare model of what has ``name`` in a model whose modules are wrapped for training."""
    inside = {attribute for attribute in _INSIDE.values() if attribute.startswith("_")}
    return ".".join(piece for piece in name.split(".") if piece not in inside)


def wrapped_names(missing: Sequence[str], unknown: Collection[str], base_prefix: str) -> str:
    """Says that a checkpoint was saved of a wrapped model, where that is why parameters are missing; empty elsewhere.

    Args:
        missing: names of parameters that transformers has not found in the checkpoint.
        unknown: keys of the checkpoint that it has no place for.
        base_prefix: of the base model, which its own checkpoints leave out.
    """
    for names in (missing, [base_name(name, base_prefix) for name in missing]):
        before = next((key.removesuffix(names[0]) for key in unknown if key.endswith(f".{names[0]}")), "")
        pieces = set(before.rstrip(".").split("."))
        if pieces <= {*_INSIDE.values(), *_OTHER_WRAPPERS} and all(before + name in unknown for name in names):
            return (
                f"its names begin with {before!r}, as those of a wrapped model do (torch.compile, DataParallel, PEFT), "
                f"so transformers starts the parameters at random. Save the model inside the wrapper with "
                f"save_pretrained, or take {before!r} off the names in the checkpoint."
            )
    return ""


def check_before_trainer(model: nn.Module, call: str) -> None:
    """Checks that no wrapper that has already noted which parameters train is around ``model``.

    Raises:
        AdapeftError: one is.
    """
    while (attribute := _wrapped_as(model)) is not None:
        if isinstance(model, DistributedDataParallel) or _is_deepspeed_engine(model):
            raise AdapeftError(
                f"adapeft.{call}: the model is wrapped in {type(model).__name__}, which noted the trainable parameters "
                f"when it was made and would not average the gradients of others. Call adapeft.{call} on the model "
                f"itself and wrap it afterwards."
            )
        model = getattr(model, attribute)


def _is_deepspeed_engine(module: nn.Module) -> bool:
    """Whether DeepSpeed made it, told by its class's name: nothing here imports DeepSpeed."""
    return any(
        cls.__module__.startswith("deepspeed.") and cls.__name__.endswith("Engine") for cls in type(module).__mro__
    )


def _wrapped_as(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds its module; None for a module that is no wrapper."""
    for kind, attribute in _INSIDE.items():
        if isinstance(module, kind):
            return attribute
    return "module" if _is_deepspeed_engine(module) else None


_PEFT_REMEDY = (
    "Pass the model that it was made from (model.unload(), or merge_and_unload() to keep PEFT's training). For LoRA "
    "within a subset, use select(method='lora') or select(options=['row', 'lora'])."
)
