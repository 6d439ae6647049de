"""Apply the rule of an attached subset in a training loop of one process."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from adapeft.errors import AdapeftError
from adapeft.model.divided import is_divided
from adapeft.tune.attachment import attachment_of
from adapeft.tune.shards import whole_leaves


def follow_rule(model: nn.Module, optimizer: Optimizer, *, num_steps: int, step: int = 0) -> None:
    """Apply the rule of the subset attached to ``model`` while ``optimizer`` trains it, in any loop of one process.

    Subsets of methods such as mixout or child-pruning need this after ``attach``; for all others it does nothing.
    ``adapeft.delta`` applies the final projection.

    Args:
        model: model with an attached subset.
        optimizer: optimizer of the trainable parameters; ``adapeft.parameter_groups`` gives DiffPruning's gates their
            own learning rate.
        num_steps: number of optimizer steps of the whole training.
        step: number of steps already done, when a checkpoint is resumed.

    Raises:
        AdapeftError: nothing is attached, the leaves are divided over ranks, or the optimizer does not train them all.
    """
    attachment = attachment_of(model)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name in attachment.dense:
        leaves = attachment.pieces(name).values()
        if any(is_divided(leaf) for leaf in leaves):
            raise AdapeftError(
                f"the leaves of {name!r} are divided over ranks, but adapeft.follow_rule works only in one process. "
                f"Train this method with the adapeft command, which applies its rule under ZeRO."
            )
        if not {id(leaf) for leaf in leaves} <= stepped:
            raise AdapeftError(
                f"the optimizer does not train all leaves of {name!r}. Create it from the parameters of the attached "
                f"model that require gradients."
            )
    follower = attachment.follow(whole_leaves(attachment), optimizer, num_steps, step)
    optimizer.register_step_post_hook(lambda *_: follower.after_step())
