"""Uploading a run's delta."""

from __future__ import annotations

from adapeft.config.keys import flatten
from adapeft.config.load import load_config
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.sections.paths import PLACES, without_secrets
from adapeft.subset.store import hash_of
from cluster.commands.push.card import card_of_run
from cluster.commands.push.repository import Repository
from cluster.output.folder import RunFolder
from cluster.output.metrics import load_metrics
from cluster.output.mirror import fetched


def push_run(place: str, name: str, *, private: bool) -> str:
    """Upload delta, subset, config, metrics, pictures and a model card in one commit, and return the commit's URL.

    Not the report, which quotes generated answers and so the data.

    Args:
        place: folder or URL of the run.
        name: repository on the hub.
        private: whether a new repository is private; an existing one has to be what it says.

    Raises:
        AdapeftError: the run is not trained, its config holds a secret, or see ``Repository``.
    """
    folder = RunFolder(fetched(place))
    if not folder.config.is_file():
        raise AdapeftError(f"{place}: not the folder of a run (no {folder.config.name}).")
    metrics = load_metrics(folder.metrics)
    if "after" not in metrics or not folder.delta.is_file():
        raise AdapeftError(f"{place}: the run has no trained delta yet. Finish it: adapeft run {folder.config}")
    config = load_config(folder.config)
    flat = flatten(config)
    for key in PLACES:
        if flat[key] and without_secrets(flat[key]) != flat[key]:
            raise AdapeftError(
                f"{place}: {key} of its config is a URL with a password or signature, which would be uploaded with the "
                "config and the delta. Run again with access that comes from the environment."
            )
    repository = Repository(name, private=private)
    identity = hash_of(folder.delta)
    repository.check(identity)
    pictures = sorted(folder.pictures.glob("*.png"))
    card = card_of_run(config, metrics, Delta.load(folder.delta), repository.name, identity, pictures)
    files = [folder.delta, folder.subset, folder.config, folder.metrics]
    return repository.upload(
        {path.relative_to(folder.path).as_posix(): path for path in (*files, *pictures)}, card, "Upload a delta"
    )
