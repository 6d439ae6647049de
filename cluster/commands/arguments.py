"""Arguments shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="YAML config of the run; `adapeft config` prints all keys")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="keys to override as key=value, such as budget=1% or method=sam")
]
