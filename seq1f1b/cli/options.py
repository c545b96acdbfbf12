"""The options that the commands share, beside Megatron's."""

from pathlib import Path
from typing import Annotated

import typer

from seq1f1b.planner.catalogue import ScheduleName

_PIPELINE, _DEVICE = "Pipeline", "Devices and links"


def flag_error(flag: str, message: str) -> typer.BadParameter:
    """Return the error that names a flag and ends the command with status 2."""
    return typer.BadParameter(message, param_hint=f"'{flag}'")


MicroBatches = Annotated[
    int | None,
    typer.Option(
        "--microbatches",
        min=1,
        help="Micro-batches of a step. [default: by --global-batch-size]",
        rich_help_panel=_PIPELINE,
    ),
]
ScheduleOption = Annotated[
    ScheduleName | None,
    typer.Option(
        "--schedule",
        help="Which schedule; chosen by chunks and splits unless given.",
        rich_help_panel=_PIPELINE,
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group",
        min=1,
        help="Interleaved: sub-sequences that go through a chunk in a turn. [default: the number "
        "of stages]",
        rich_help_panel=_PIPELINE,
    ),
]
BackwardRatio = Annotated[
    float,
    typer.Option(
        "--backward-ratio",
        min=0.01,
        help="Time of a backward over that of its forward, where no GPU is named.",
        rich_help_panel=_DEVICE,
    ),
]
Tflops = Annotated[
    float | None,
    typer.Option(
        "--tflops",
        min=1e-6,
        help="TFLOP/s that a stage reaches on the model, instead of a GPU's kernel curves.",
        rich_help_panel=_DEVICE,
    ),
]
Latency = Annotated[
    float | None,
    typer.Option(
        "--latency",
        min=0.0,
        help="From a stage to the next: in seconds with a model or trace, else in forwards of a "
        "stage on one micro-batch. [default: the GPU's, or 0]",
        rich_help_panel=_DEVICE,
    ),
]
Bandwidth = Annotated[
    float | None,
    typer.Option(
        "--bandwidth",
        min=1e-6,
        help="GB/s from a stage to the next; needs a model. [default: the GPU's, or no limit]",
        rich_help_panel=_DEVICE,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Measured actions instead of a cost model: JSON lines with stage, action, start and "
        "end in seconds.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
