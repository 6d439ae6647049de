"""Whether the packages that are installed with this one are the ones that Python finds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from adapeft.errors import AdapeftError

_HOME = Path(__file__).resolve().parents[1]


def check_not_shadowed(package: str) -> None:
    """Checks that ``package`` is ours: ``cluster`` and ``solver`` are names of other distributions on PyPI too.

    Raises:
        AdapeftError: Python finds another package of that name first, or none.
    """
    spec = find_spec(package)
    if spec is None:
        raise AdapeftError(f"the package {package!r} of adapeft is missing: install adapeft again.")
    found = Path((spec.submodule_search_locations or [spec.origin or "built-in"])[0]).resolve()
    if found != _HOME / package:
        raise AdapeftError(
            f"the package {package!r} of adapeft is hidden by another one of that name, {found}. Uninstall that one, "
            f"run from another folder, or take it out of PYTHONPATH; where both were installed into one environment, "
            f"install adapeft again afterwards."
        )
