"""What DeepSpeed's optimizers step, parameter by parameter: values and Adam's moments, this rank's part of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from adapeft.measure.shards import adam_state
from cluster.master_weights import MasterWeights


@dataclass(frozen=True)
class Piece:
    """This rank's part of one trained parameter.

    Attributes:
        name: of the parameter.
        start: of the part in the flattened parameter.
        columns: ``value``, ``exp_avg`` and ``exp_avg_sq``, each [length], and the count of steps, ``step``. Live: what
            is written into them is stepped from, and ``MasterWeights.publish`` brings it to the weights.
    """

    name: str
    start: int
    columns: dict[str, Tensor]


def trained_pieces(
    engine: DeepSpeedEngine, masters: MasterWeights, parameters: Mapping[str, nn.Parameter]
) -> list[Piece]:
    """The pieces of ``parameters`` that this rank holds; at stage 0 every rank holds all."""
    pieces = []
    for name, parameter in parameters.items():
        place = masters.range_of(parameter)
        if place is None or not place.length:
            continue
        state = adam_state(engine.basic_optimizer, place.flat)
        flats = {"value": place.flat.detach(), **{moment: state[moment] for moment in ("exp_avg", "exp_avg_sq")}}
        columns = {column: flat.view(-1).narrow(0, place.offset, place.length) for column, flat in flats.items()}
        pieces.append(Piece(name, place.start, {**columns, "step": state["step"]}))
    return pieces
