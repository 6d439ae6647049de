"""The record of an attached subset: locations of the trained parameters, and the state of the model before."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adapeft.errors import AdapeftError
from adapeft.model.divided import shape_of
from adapeft.model.wrappers import ATTACHMENT, unwrap
from adapeft.parts.rule import DIFFERENCE, LeafShards, Rule, Ruled
from adapeft.subset.subset import Subset
from adapeft.tune.follower import Follower


class Owner(NamedTuple):
    """Module and name of a parameter, and its whole shape.

    The parameter itself is not stored, because FSDP2, ``load_state_dict(assign=True)`` and others replace it.
    """

    module: nn.Module
    name: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Owner:
        """Return the owner of the parameter ``name`` of ``module``."""
        return cls(module, name, shape_of(module.get_parameter(name)))


@dataclass
class Attachment:
    """An attached subset, and the state of the model before ``attach``.

    Attributes:
        subset: the attached subset.
        fingerprint: fingerprint of the base model.
        digests: digests of its parameters, see ``adapeft.model.fingerprint``; None without weights.
        owners: name of a part or of an always-trained parameter → its trained parameters by their own names: the
            pieces that a part adds, the leaves of a dense part, otherwise one under the empty name.
        base: name → value before training, float32 on the CPU, of every parameter that is trained whole and not new:
            what this process holds of it, see ``own_part``.
        required_grad: name → ``requires_grad`` before, of every parameter.
        rule: rule of the dense parts; that of a fixed mask if there are none.
        dense: name → the parameter of a dense part and its rule.
        buffers: name → value before training, on the CPU, of every buffer that a checkpoint holds.
        dropout: module and attribute → probability before, if the rule has turned dropout off.
        hooks: registered hooks: the check before each forward pass that the subset is trained, and the loaders of
            merged checkpoints.
        in_place: layers that ``adapeft.model.quantized.keep_codes_in_place`` changed.
        reached: names and pieces, as in ``owners``, of the trained parameters that have received a gradient. It is not
            updated for copies of the model, or if a trainer replaces the parameters.
        is_checked: whether a training step has found the model as ``attach`` left it.
        follower: object that applies the rule, once there is an optimizer.
        is_off: whether the model computes as the base, in ``adapeft.base``.
    """

    subset: Subset
    fingerprint: str
    digests: Tensor | None = field(repr=False)
    owners: dict[str, dict[str, Owner]] = field(repr=False)
    base: dict[str, Tensor]
    required_grad: dict[str, bool] = field(repr=False)
    rule: Rule
    dense: dict[str, Ruled] = field(repr=False)
    buffers: dict[str, Tensor] = field(repr=False)
    dropout: dict[tuple[nn.Module, str], float] = field(repr=False)
    hooks: list[RemovableHandle] = field(repr=False)
    in_place: list[nn.Module] = field(repr=False)
    reached: set[tuple[str, str]] = field(default_factory=set, repr=False)
    is_checked: bool = False
    follower: Follower | None = None
    is_off: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # A follower writes to the leaves that its optimizer updates, which a copy of the model does not share.
        return {**self.__dict__, "follower": None}

    @property
    def unreached(self) -> list[str]:
        """Names in ``owners`` with a trained parameter that has not yet received a gradient."""
        return [
            name for name, pieces in self.owners.items() if any((name, piece) not in self.reached for piece in pieces)
        ]

    def note_gradients(self) -> None:
        """Register hooks that record in ``reached`` the parameters that receive a gradient."""
        for name in self.owners:
            for piece, parameter in self.pieces(name).items():
                parameter.register_hook(partial(_note, self.reached, (name, piece)))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Name → trainable parameter: a leaf, or the parameter itself if it is trained whole.

        Parameters that a part adds are named after the part and the piece, ``….weight.lora_A``. For a dense part, this
        contains its difference.
        """
        found = {}
        for name in self.owners:
            pieces = self.pieces(name)
            if name in self.dense:
                found[name] = pieces[DIFFERENCE]
            else:
                found.update({f"{name}.{piece}" if piece else name: value for piece, value in pieces.items()})
        return found

    @property
    def added(self) -> dict[str, dict[str, nn.Parameter]]:
        """Name of a part → the parameters that it adds, by their own names."""
        return {name: self.pieces(name) for name, part in self.subset.parts.items() if part.pieces}

    def pieces(self, name: str) -> dict[str, nn.Parameter]:
        """Return the current trained parameters of ``name`` by their own names.

        Raises:
            AdapeftError: the model no longer has one of them.
        """
        found = {}
        for piece, owner in self.owners[name].items():
            parameter = owner.module._parameters.get(owner.name)
            if parameter is None:
                raise AdapeftError(
                    f"the parameter that trains {name!r} is no longer in the model: it was flattened or removed after "
                    f"adapeft.attach. FullyShardedDataParallel needs use_orig_params=True."
                )
            found[piece] = parameter
        return found

    def follow(self, leaves: LeafShards, optimizer: Optimizer, num_steps: int, step: int = 0) -> Follower:
        """Start to apply the rule; the arguments are those of ``Follower``."""
        self.follower = Follower(self.rule, leaves, optimizer, num_steps, step)
        return self.follower


def attachment_of(model: nn.Module) -> Attachment:
    """Return the attachment of a model, which may be wrapped.

    Raises:
        AdapeftError: nothing is attached.
    """
    attachment = getattr(unwrap(model), ATTACHMENT, None)
    if attachment is None:
        raise AdapeftError("no subset is attached to this model. Call adapeft.attach(model, subset) first.")
    return attachment


def check_is_on(attachment: Attachment, call: str) -> None:
    """Check that the model is not within ``adapeft.base``.

    Raises:
        AdapeftError: it is, so its whole tensors hold the base's values.
    """
    if attachment.is_off:
        raise AdapeftError(
            f"{call}: the delta is switched off within adapeft.base(model), where tensors that are trained whole hold "
            f"the pretrained values. Leave that context first."
        )


def _note(reached: set[tuple[str, str]], piece: tuple[str, str], gradient: Tensor) -> None:
    reached.add(piece)
