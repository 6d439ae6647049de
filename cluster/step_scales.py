"""Measures, before training, which tensors get a smaller learning rate; see ``adapeft.tune.step_scales``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from adapeft.artifact import save_json
from adapeft.choose.subset import Subset
from adapeft.config import Config
from adapeft.errors import AdapeftError
from adapeft.measure.groups import groups_of
from adapeft.measure.measure import with_warm_up
from adapeft.measure.part_curvature import measure_part_curvatures
from adapeft.methods import get_method
from adapeft.reading import Header, Line, load_json, reading
from adapeft.tune.step_scales import step_scales
from cluster.engine import DistributedRanks
from cluster.events import Report
from cluster.inputs import Inputs
from cluster.measure import measuring_passes
from cluster.run_folder import RunFolder

_MEASURED_KINDS = ("tensor", "rows", "elements")


def step_scales_of(
    config: Config, inputs: Inputs, subset: Subset, ranks: DistributedRanks, report: Report
) -> dict[str, float]:
    """Parts of the learning rate by tensor: measured now, or before the run was interrupted. Collective.

    LoRA and adapters keep the whole learning rate: along the direction of a weight nothing is said of them.
    """
    path = RunFolder.of(config).step_scales
    # One rank looks: another may have written the file by the time that a third would.
    known: dict[str, float] | None = ranks.all_gather_object(_load(path) if ranks.rank == 0 else None)[0]
    if known is not None:
        return known
    counts = {name: part.count for name, part in subset.parts.items()}
    scales = step_scales(_measure(config, inputs, subset, ranks, report), counts)
    if ranks.rank == 0:
        save_json(path, {"step_scales": scales})
    return scales


def _measure(
    config: Config, inputs: Inputs, subset: Subset, ranks: DistributedRanks, report: Report
) -> dict[str, float]:
    parts = {name: part for name, part in subset.parts.items() if part.kind in _MEASURED_KINDS}
    if not parts:
        kinds = sorted({part.kind for part in subset.parts.values()})
        raise AdapeftError(f"train.limit_steps = true: the subset trains {' and '.join(kinds)} alone. Leave it out.")
    settings = config.select.model_copy(update={"groups": "tensor", "include": tuple(parts), "exclude": ()})
    model = inputs.model().eval()
    groups = groups_of(model, settings)
    with measuring_passes(config, inputs, model, groups, settings.batch_size, ranks, report) as passes:
        passes = with_warm_up(get_method("adapeft"), passes, groups, settings)
        return measure_part_curvatures(passes, groups, parts)


class _StepScales(Header):
    step_scales: dict[Line, Annotated[float, Field(gt=0, le=1)]]


def _load(path: Path) -> dict[str, float] | None:
    if not path.is_file():
        return None
    remedy = "Remove it, and run again."
    content = load_json(path, "what a run writes", remedy)
    with reading(f"{path}: damaged", remedy):
        return _StepScales.model_validate(content).step_scales
