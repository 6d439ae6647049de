"""What ``attach`` did to a model: where the trained parameters are, and what was there before."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adapeft.errors import AdapeftError
from adapeft.model.wrappers import ATTACHMENT, unwrap
from adapeft.parts.rule import DIFFERENCE, LeafShards, Rule, Ruled
from adapeft.subset.subset import Subset
from adapeft.tune.follower import Follower


class Owner(NamedTuple):
    """Where a parameter is, and its whole shape.

    FSDP2, ``load_state_dict(assign=True)`` and others replace the parameter itself, so nothing keeps it but its module.
    """

    module: nn.Module
    name: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Owner:
        """The owner of the parameter ``name`` of ``module``."""
        return cls(module, name, tuple(module.get_parameter(name).shape))


@dataclass
class Attachment:
    """What ``attach`` did to a model.

    Attributes:
        subset: the subset attached.
        fingerprint: of the base model.
        digests: of its parameters, see ``adapeft.model.fingerprint``; None without weights.
        owners: name of a part or of an always-trained parameter → its trained parameters by their own names: the
            pieces that a part adds, the leaves of a dense part, else one under the empty name.
        base: name → its value before training, float32 on the CPU, where it is trained whole and not new.
        required_grad: ``requires_grad`` of every parameter before.
        rule: of the dense parts; that of a fixed mask where there are none.
        dense: name → the parameter of a dense part and its rule.
        buffers: name → value before training, on the CPU, of every buffer that a checkpoint holds.
        dropout: module and attribute → the probability before, where the rule turned dropout off.
        hooks: what ``attach`` has registered: the check before each forward pass that the subset is trained, and
            what reads merged checkpoints.
        reached: names and pieces, as in ``owners``, of the trained parameters that a backward pass has given a
            gradient. Copies, and trainers that replace the parameters, see nothing of it.
        is_checked: whether a training step has found the model as ``attach`` left it.
        follower: what keeps the rule, once an optimizer is there.
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
    reached: set[tuple[str, str]] = field(default_factory=set, repr=False)
    is_checked: bool = False
    follower: Follower | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A follower writes to the leaves that its optimizer steps, which are not those of a copy.
        return {**self.__dict__, "follower": None}

    @property
    def unreached(self) -> list[str]:
        """The names in ``owners`` of which a trained parameter has not yet received a gradient."""
        return [
            name for name, pieces in self.owners.items() if any((name, piece) not in self.reached for piece in pieces)
        ]

    def note_gradients(self) -> None:
        """Makes ``reached`` follow the backward passes."""
        for name in self.owners:
            for piece, parameter in self.pieces(name).items():
                parameter.register_hook(partial(_note, self.reached, (name, piece)))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Name → the trainable parameter: a leaf, or the parameter itself where it is trained whole.

        What a part adds has the part's name and its own, ``….weight.lora_A``; of a dense part the difference is here.
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
        """Name → the parameters that the part adds, by their own names."""
        return {name: self.pieces(name) for name, part in self.subset.parts.items() if part.pieces}

    def pieces(self, name: str) -> dict[str, nn.Parameter]:
        """The trained parameters of ``name`` by their own names, as the model holds them now.

        Raises:
            AdapeftError: the model no longer has one.
        """
        found = {}
        for piece, owner in self.owners[name].items():
            parameter = owner.module._parameters.get(owner.name)
            if parameter is None:
                raise AdapeftError(
                    f"the parameter that trains {name!r} is no longer in the model: something has flattened it or "
                    f"taken it out since adapeft.attach. FullyShardedDataParallel needs use_orig_params=True."
                )
            found[piece] = parameter
        return found

    def follow(self, leaves: LeafShards, optimizer: Optimizer, num_steps: int, step: int = 0) -> Follower:
        """Keeps the rule from here on; the arguments are those of ``Follower``."""
        self.follower = Follower(self.rule, leaves, optimizer, num_steps, step)
        return self.follower


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a model, which may be wrapped.

    Raises:
        AdapeftError: nothing is attached.
    """
    attachment = getattr(unwrap(model), ATTACHMENT, None)
    if attachment is None:
        raise AdapeftError("no subset is attached to this model: call adapeft.attach(model, subset) first.")
    return attachment


def _note(reached: set[tuple[str, str]], piece: tuple[str, str], gradient: Tensor) -> None:
    reached.add(piece)
