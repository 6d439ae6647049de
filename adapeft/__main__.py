"""Entry point of the command ``adapeft`` and of ``python -m adapeft``."""

from __future__ import annotations

import sys
from importlib import import_module

from adapeft.errors import AdapeftError
from adapeft.installation import check_not_shadowed


def main() -> None:
    """Check that no other distribution shadows ``cluster`` or ``solver``, then run ``cluster.cli``.

    ``cluster`` is imported by name, because no module of ``adapeft`` may import it.
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
