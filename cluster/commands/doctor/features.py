"""What each feature needs, and what of that is missing here."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from io import StringIO

import torch
from packaging.requirements import Requirement

from adapeft.errors import AdapeftError
from cluster.commands.doctor.packages import installed_version

_RAY_SECONDS = 5.0


@dataclass(frozen=True)
class Feature:
    """A feature and the reason why it does not work here.

    Attributes:
        name: the feature, as a user would call it.
        problem: what is missing, and how to get it; None where the feature works.
        is_required: whether `adapeft run` needs it on every machine.
    """

    name: str
    problem: str | None
    is_required: bool = False


def features() -> list[Feature]:
    """Every feature with its problem; compiles DeepSpeed's operation unless that has been done (about a minute)."""
    commands = _missing("cluster")
    return [
        Feature("library: select, attach, delta", _missing(), is_required=True),
        Feature("commands: run, compare, …", commands or _first_error(_compile), is_required=True),
        Feature("Ray: several machines, submit", commands or _first_error(_reach_ray)),
        Feature("GPUs", None if torch.cuda.is_available() else "torch finds no CUDA device."),
        Feature("outputs at s3:// URLs", _missing("s3")),
        Feature("W&B and MLflow", _missing("tracking")),
        Feature("bases of 8 and 4 bits", _missing("quantization")),
        Feature("make demo", _missing("demo")),
    ]


def _missing(extra: str = "") -> str | None:
    """Names the packages of ``adapeft[extra]``, as pyproject.toml declares them, that are not installed or too old."""
    install = f"pip install 'adapeft[{extra}]'" if extra else "pip install adapeft"
    try:
        declared = [Requirement(line) for line in requires("adapeft") or []]
    except PackageNotFoundError:
        return f"adapeft runs from a folder without having been installed. {install}"
    wanted = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": extra})]
    found = {one.name: installed_version(one.name) for one in wanted}
    lacking = [
        f"{one.name}{one.specifier}" + (f" (installed: {found[one.name]})" if found[one.name] else "")
        for one in wanted
        if found[one.name] is None or not one.specifier.contains(str(found[one.name]), prereleases=True)
    ]
    return f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing: {install}" if lacking else None


def _first_error(check: Callable[[], None]) -> str | None:
    try:
        check()
    except AdapeftError as error:
        return str(error)
    return None


def _compile() -> None:
    """Compiles and loads what every worker loads."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from cluster.zero.compiled import load_compiled

    with redirect_stdout(StringIO()):  # DeepSpeed prints that it has been built
        load_compiled()


def _reach_ray() -> None:
    from cluster.launch.ray.connection import address_of, check_answers

    check_answers(address_of(), _RAY_SECONDS)
