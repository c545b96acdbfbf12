"""Options that the commands of ``seq1f1b ulysses`` share."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_CONFIG",
        help="A folder with config.json, that file, a name on the hub, or a model type such as "
        "qwen3_next, with its defaults. Weights are not read.",
    ),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
