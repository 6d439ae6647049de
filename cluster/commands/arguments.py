"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="YAML config; `adapeft config` prints one with every key")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as budget=1% or select.method=sam")]
