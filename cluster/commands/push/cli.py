"""The command line of ``adapeft push``."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.terminal.silence import silence_libraries

Private = Annotated[bool, typer.Option("--private/--public", help="who can see the repository on the hub")]


def push(
    run: Annotated[str, typer.Argument(help="folder or URL of a trained run")],
    repository: Annotated[str, typer.Argument(help="repository on the Hugging Face Hub: me/name")],
    private: Private = True,
) -> None:
    """Upload the delta of a run to the Hugging Face Hub, with a model card (a merged checkpoint: `adapeft merge`)."""
    from cluster.commands.push.push import push_run

    silence_libraries()
    print(push_run(run, repository, private=private))
