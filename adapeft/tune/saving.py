"""``save_pretrained`` of a model with an attached subset, and loading of weights into it.

A state dict of such a model holds the base and the leaves separately; ``from_pretrained`` would load it as the
untrained base with some unknown keys. Therefore the ``save_pretrained`` of the instance is replaced by one that merges
first. The class is unchanged: state dicts keep their names and values for everything else that uses them, such as
checkpoints of DeepSpeed and FSDP, averages of weights, and DistributedDataParallel.

The Trainer's checkpoints hold only what is trained; see ``adapeft.tune.checkpoint``. Hooks on the modules that own
leaves accept the base's own weights and refuse those of a merged model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adapeft.errors import AdapeftError
from adapeft.model.divided import full_value, is_divided
from adapeft.model.quantized import quantization_of
from adapeft.model.rounding import Rounding
from adapeft.model.structure import reparametrized, unsaved_parameters
from adapeft.model.wrappers import ATTACHMENT, unwrap
from adapeft.parts.change import Change
from adapeft.parts.layers.bottleneck import has_bottleneck
from adapeft.parts.layers.lora import BASE_LAYER, wrapped_names
from adapeft.parts.trained import TrainedWeight, trained_difference, trained_weights
from adapeft.tune.attachment import check_is_on
from adapeft.tune.checkpoint import save_checkpoint


def hook_saving(model: nn.Module) -> list[RemovableHandle]:
    """Make ``save_pretrained`` of ``model`` and of the models in it write the trained weights."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # An instance attribute that is a partial of a function is pickled and copied with its model.
            module.__dict__["save_pretrained"] = partial(save_trained, module)
    return [module.register_load_state_dict_pre_hook(_check) for module in model.modules() if trained_weights(module)]


def unhook_saving(model: nn.Module) -> None:
    """Restore the original ``save_pretrained`` of the models."""
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)


def save_trained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Write the trained model: base + difference, rounded once to the base's dtype. Replaces ``save_pretrained``.

    The Trainer's own call for a folder ``checkpoint-N`` writes only what is trained.

    Args:
        model: model with an attached subset, or a submodel of one.
        save_directory: folder to write.
        is_main_process: whether this process writes, as trainers pass it; None: it does.
        state_dict: state dict of ``model``, if a trainer has gathered it.
        options: options of ``PreTrainedModel.save_pretrained``.

    Raises:
        AdapeftError: the model has adapters or a quantized base, which cannot be merged, or shards that were not
            gathered.
    """
    if (attachment := getattr(unwrap(model), ATTACHMENT, None)) is not None:
        check_is_on(attachment, "save_pretrained")
    state = _whole_state(model) if state_dict is None else dict(state_dict)
    writes = is_main_process is not False
    is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(save_directory).name) is not None
    if attachment is not None and is_checkpoint and is_main_process is not None and not options:
        save_checkpoint(model, attachment, Path(save_directory), state, writes=writes)
        return
    if obstacle := _obstacle(model):
        raise AdapeftError(
            f"save_pretrained: {obstacle}, so a plain checkpoint cannot hold the trained weights. Call "
            f"adapeft.delta(model).save(path), and adapeft.Delta.load(path).apply(base) to use it. The Trainer's "
            f"checkpoints during training are not affected; with it, call adapeft.delta instead of save_model."
        )
    merged, rounding = _merged(model, state)
    rounding.warn('adapeft.delta(model) keeps them, and adapeft.merge(..., dtype="float32") writes them.')
    type(model).save_pretrained(model, save_directory, writes, merged, **options)


@torch.no_grad()
def _merged(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Rounding]:
    """Return the state dict of the plain model equivalent to ``model`` in evaluation mode, and its rounding losses.

    Args:
        model: model with leaves or LoRA.
        state: its state dict, or the part of it that a trainer saves.
    """
    merged, rounding = dict(state), Rounding()
    done: dict[tuple[int, ...], Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for trained in trained_weights(module):
            keys = [prefix + trained.weight, *(prefix + leaf for leaf in trained.leaves)]
            missing = [key for key in keys if key not in merged]
            if len(missing) == len(keys):
                continue  # a trainer that saves shards separately passes an empty state dict
            if missing:
                raise AdapeftError(
                    f"save_pretrained: the state dict has no {missing[0]!r}, which is needed to write the trained "
                    f"weight {prefix + trained.plain!r}. Pass the whole state dict of the attached model."
                )
            weight = merged[keys[0]]
            leaves = {key: merged.pop(key) for key in keys[1:]}
            # A tied weight is in the state dict under all its names, and must remain one tensor.
            place = (weight.data_ptr(), *(leaf.data_ptr() for leaf in leaves.values()))
            if place not in done:
                done[place], lost = _sum(prefix + trained.plain, module, trained, weight, list(leaves.values()))
                rounding += lost
            merged[keys[0]] = done[place]
    inside = [f"{path}.{BASE_LAYER}." for path, module in model.named_modules() if wrapped_names(module)]
    return {_plain_name(key, inside): value for key, value in merged.items()}, rounding


def _plain_name(key: str, inside: Sequence[str]) -> str:
    """Return the name that a key of the state dict has in the plain model, without the layers of LoRA."""
    place = next((place for place in inside if key.startswith(place)), None)
    return key if place is None else place.removesuffix(f"{BASE_LAYER}.") + key.removeprefix(place)


def _sum(
    name: str, module: nn.Module, trained: TrainedWeight, weight: Tensor, leaves: list[Tensor]
) -> tuple[Tensor, Rounding]:
    """Return a copy of the base's ``weight`` with ``leaves`` merged into it, and the changes lost to rounding."""
    part, values = trained_difference(module, trained, weight.shape, leaves)
    total = weight.clone()
    return total, Change(part, values.float()).add_to(name, total)


def _obstacle(model: nn.Module) -> str:
    """Return the reason why training cannot be merged into plain weights, or an empty string if it can."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path, module in model.named_modules():
        trained.update(f"{path}.{one.plain}".lstrip(".") for one in trained_weights(module))
        if has_bottleneck(module):
            return f"an adapter follows {path!r}"
        if getattr(module, "hf_quantizer", None) is not None or quantization_of(module):
            return "the base is quantized"
    if isinstance(model, PreTrainedModel) and (path := reparametrized(model)):
        return (
            f"{path!r} computes a weight from other parameters (by pruning, weight_norm, spectral_norm or a "
            f"parametrization; remove it before adapeft.attach), which from_pretrained does not support"
        )
    if unsaved := trained & unsaved_parameters(model):
        return f"{type(model).__name__} does not write {min(unsaved)!r} to its checkpoints"
    return ""


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with whole tensors. Collective if FSDP2 has divided them."""
    for name, parameter in model.named_parameters():
        if is_divided(parameter) == "ZeRO-3":
            raise AdapeftError(
                f"save_pretrained: {name!r} is divided over ranks by ZeRO-3. Pass the gathered weights with "
                f"save_pretrained(path, state_dict=accelerator.get_state_dict(engine)), or use Trainer.save_model."
            )
    return {
        name: full_value(value) if isinstance(value, Tensor) else value for name, value in model.state_dict().items()
    }


def _check(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Check that weights without leaves are the base's, and name those of layers with LoRA as in the model.

    Raises:
        AdapeftError: they are not, as those of a merged model.
    """
    for trained in trained_weights(module):
        plain = prefix + trained.plain
        if plain in state and not any(prefix + leaf in state for leaf in trained.leaves):
            found, own = state[plain], module.get_parameter(trained.weight).detach()
            if is_divided(own) or not _nearly_equal(own.to(found.device, found.dtype), found):
                raise AdapeftError(
                    f"the state dict has {plain!r} without its trained leaves, and with other values than the base: it "
                    f"is most likely a merged model, whose training would count twice. Load it into a model without a "
                    f"subset, or attach the subset after loading it."
                )
    for name in wrapped_names(module):
        if prefix + name in state:
            state[f"{prefix}{BASE_LAYER}.{name}"] = state.pop(prefix + name)


def _nearly_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of one product and one sum, which differs between devices."""
    if found.shape != expected.shape:
        return False
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=4 * eps, atol=4 * eps * float(expected.abs().max()))
