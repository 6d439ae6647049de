"""Unwrapping of models that other libraries have wrapped, and checks for layers that they have inserted."""

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
"""Attribute of a model to which a subset is attached."""

_INSIDE: dict[type[nn.Module], str] = {
    OptimizedModule: "_orig_mod",
    ActivationWrapper: "_checkpoint_wrapped_module",
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    DistributedDataParallel: "module",
    DataParallel: "module",
    AveragedModel: "module",
}
"""Wrapper class → attribute that holds the wrapped module."""

_OTHER_WRAPPERS = ("base_model", "model")
"""Further attributes of wrappers that occur in checkpoint names: those of PEFT and Lightning."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers.

    Raises:
        AdapeftError: the model is wrapped by PEFT, which changes its outputs.
    """
    while (attribute := _wrapped_as(model)) is not None:
        model = getattr(model, attribute)
    if isinstance(model, PeftModel | PeftMixedModel):
        raise AdapeftError(
            f"the model is a {type(model).__name__}: PEFT has inserted its own layers and frozen everything else, "
            f"including an attached subset. {_PEFT_REMEDY}"
        )
    return model


def bare(model: nn.Module, call: str, *, gathers: bool = False) -> nn.Module:
    """Return the model inside its wrappers, after checking that its parameters are whole and have their own names.

    Args:
        model: model that the user passed.
        call: name of the public function that it was passed to, for the messages.
        gathers: whether that function gathers parameters that ZeRO-3 has divided, where it reads or changes them.

    Raises:
        AdapeftError: parameters are partitioned, or another library has inserted layers or wrappers.
    """
    inner = unwrap(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise AdapeftError(
            f"adapeft.{call}: the model is sharded by FullyShardedDataParallel. Call adapeft.{call} first and shard "
            f"the model afterwards."
        )
    for name, parameter in inner.named_parameters():
        if is_divided(parameter) and not (gathers and is_divided(parameter) == "ZeRO-3"):
            raise AdapeftError(
                f"adapeft.{call}: the parameter {name!r} is partitioned over ranks ({is_divided(parameter)}). Call "
                f"adapeft.{call} on the whole model first and shard it afterwards: load it before the DeepSpeed "
                f"configuration is created, attach, and only then call fully_shard, deepspeed.initialize or the "
                f"Trainer."
            )
    for path, module in inner.named_modules():
        if isinstance(module, BaseTunerLayer) and not hasattr(inner, ATTACHMENT):
            raise AdapeftError(
                f"adapeft.{call}: {path!r} is a PEFT layer ({type(module).__name__}), so the model is not the "
                f"unmodified base. {_PEFT_REMEDY}"
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
    """Return ``name`` without the attributes of wrappers around modules: the name in the unwrapped model."""
    inside = {attribute for attribute in _INSIDE.values() if attribute.startswith("_")}
    return ".".join(piece for piece in name.split(".") if piece not in inside)


def wrapped_names(missing: Sequence[str], unknown: Collection[str], base_prefix: str) -> str:
    """Return an explanation if parameters are missing because the saved model was wrapped; empty otherwise.

    Args:
        missing: names of parameters that transformers did not find in the checkpoint.
        unknown: keys of the checkpoint that match no parameter.
        base_prefix: prefix of the base model, which its own checkpoints leave out.
    """
    for names in (missing, [base_name(name, base_prefix) for name in missing]):
        before = next((key.removesuffix(names[0]) for key in unknown if key.endswith(f".{names[0]}")), "")
        pieces = set(before.rstrip(".").split("."))
        if pieces <= {*_INSIDE.values(), *_OTHER_WRAPPERS} and all(before + name in unknown for name in names):
            return (
                f"its names begin with {before!r}, like those of a wrapped model (torch.compile, DataParallel, PEFT), "
                f"so transformers initializes the parameters at random. Save the model inside the wrapper with "
                f"save_pretrained, or remove {before!r} from the names in the checkpoint."
            )
    return ""


def check_before_trainer(model: nn.Module, call: str) -> None:
    """Check that ``model`` is not inside a wrapper that has already recorded the trainable parameters.

    Raises:
        AdapeftError: it is.
    """
    while (attribute := _wrapped_as(model)) is not None:
        if isinstance(model, DistributedDataParallel) or _is_deepspeed_engine(model):
            raise AdapeftError(
                f"adapeft.{call}: the model is wrapped in {type(model).__name__}, which recorded the trainable "
                f"parameters when it was created and would not average the gradients of others. Call adapeft.{call} on "
                f"the unwrapped model and wrap it afterwards."
            )
        model = getattr(model, attribute)


def _is_deepspeed_engine(module: nn.Module) -> bool:
    """Whether a module is a DeepSpeed engine, by its class name: DeepSpeed is not imported here."""
    return any(
        cls.__module__.startswith("deepspeed.") and cls.__name__.endswith("Engine") for cls in type(module).__mro__
    )


def _wrapped_as(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper holds its module; None if the module is not a wrapper."""
    for kind, attribute in _INSIDE.items():
        if isinstance(module, kind):
            return attribute
    return "module" if _is_deepspeed_engine(module) else None


_PEFT_REMEDY = (
    "Pass the model without PEFT (model.unload(), or merge_and_unload() to keep PEFT's training). For LoRA in a "
    "subset, use select(method='lora') or select(options=['row', 'lora'])."
)
