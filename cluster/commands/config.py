"""``adapeft config``: check a config, print the defaults or the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from adapeft.errors import AdapeftError
from cluster.commands.arguments import Overrides


def config(
    path: Annotated[Path | None, typer.Argument(help="YAML config to check; default: print the defaults")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of configs")] = False,
) -> None:
    """Check a config and print it with all defaults, or print every key with its default."""
    from adapeft.config.load import load_config
    from adapeft.config.write import defaults_yaml, json_schema, to_yaml

    if schema and path is not None:
        raise AdapeftError(f"--schema: prints the schema of every config, and reads no {path}. Leave one of them out.")
    if schema:
        print(json.dumps(json_schema(), indent=2))
    elif path is None:
        print(defaults_yaml(), end="")
    else:
        print(to_yaml(load_config(path, overrides or [])), end="")
