"""A choice from statistics that were measured before."""

from __future__ import annotations

from pathlib import Path

from adapeft.config.keys import measured_differently, measurement_key
from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from adapeft.measure.directions import Directions
from adapeft.measure.storage import ELEMENTS, OPTIONS, TABLE, load_statistics
from adapeft.ranks import OneRank
from adapeft.subset.subset import Subset
from cluster.output.folder import CONFIG, SUBSET, RunFolder
from cluster.output.mirror import fetched
from cluster.ranks.choose import choose_and_save
from cluster.ranks.inputs import count_examples
from cluster.run.session import Session


def choose_again(session: Session) -> Subset:
    """Choose from the statistics that ``select.statistics`` names, or from the run's own.

    Raises:
        AdapeftError: they were measured under other conditions.
    """
    source = _measured(session.config.select.statistics or str(session.folder.path))
    statistics, measured = load_statistics(source)
    num_parameters = session.inspection.groups.num_total
    is_quantized = statistics.groups.is_quantized
    wanted = measurement_key(session.config, session.contents, num_parameters, is_quantized=is_quantized)
    other = measured_differently(wanted, measured)
    if other:
        raise AdapeftError(
            f"select.statistics = {source} was measured under other conditions:\n  " + "\n  ".join(other) + "\nLeave "
            "select.statistics out to measure again."
        )
    return choose_and_save(
        session.config,
        session.contents,
        statistics,
        count_examples(session.config, session.inspection.description),
        OneRank(),
        session.inspection.limit,
        before=_directions(RunFolder(source)),
    )


def _directions(measured: RunFolder) -> Directions | None:
    """Return the directions of the first choice from these statistics, if they were counted.

    Its elements are the steepest too, so few directions there are few in a choice for another learning rate or budget.
    """
    if not measured.subset.is_file():
        return None
    first = Subset.load(measured.subset).choice
    if first.directions is None or first.candidate_directions is None:
        return None
    return Directions(first.directions, first.candidate_directions)


def _measured(place: str) -> Path:
    """Return the folder of the run in ``place``, or of the run it chose from: statistics of elements are not copied."""
    folder = RunFolder(fetched(place, (CONFIG, SUBSET, TABLE, OPTIONS, ELEMENTS)))
    if folder.config.is_file():
        select = load_config(folder.config).select
        if select.granularity == "element" and select.statistics is not None:
            return _measured(select.statistics)
    return folder.path
