"""A check that no other distribution shadows the packages installed with this one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from adapeft.errors import AdapeftError

_HOME = Path(__file__).resolve().parents[1]


def check_not_shadowed(package: str) -> None:
    """Check that Python finds our ``package``: PyPI has other distributions named ``cluster`` and ``solver``.

    Raises:
        AdapeftError: Python finds no package of that name, or another one first.
    """
    spec = find_spec(package)
    if spec is None:
        raise AdapeftError(f"the package {package!r} of adapeft is missing: reinstall adapeft.")
    found = Path((spec.submodule_search_locations or [spec.origin or "built-in"])[0]).resolve()
    if found != _HOME / package:
        raise AdapeftError(
            f"the package {package!r} of adapeft is shadowed by another package of that name, {found}. Uninstall that "
            f"package, run from another folder, or remove it from PYTHONPATH. If both were installed into one "
            f"environment, reinstall adapeft afterwards."
        )
