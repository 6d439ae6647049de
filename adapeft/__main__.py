"""The command ``adapeft``, also as ``python -m adapeft``."""

from __future__ import annotations

import sys
from importlib import import_module

from adapeft.errors import AdapeftError
from adapeft.installation import check_not_shadowed


def main() -> None:
    """Runs ``cluster.cli`` once it is known to be ours.

    It is imported by name because nothing else here may know ``cluster``.
    """
    try:
        for package in ("cluster", "solver"):
            check_not_shadowed(package)
    except AdapeftError as error:
        print(f"error {error}", file=sys.stderr)
        sys.exit(2)  # as cluster.terminal.exit_status.REFUSED, which may be the package that is missing
    import_module("cluster.cli").main()


if __name__ == "__main__":
    main()
