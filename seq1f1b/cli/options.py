"""The options that the commands share, beside Megatron's."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from seq1f1b.files import cannot_write
from seq1f1b.planner.catalogue import ScheduleName

_MOST = 10**9
_MOST_NUMBER = 1e12
_PIPELINE, _DEVICE = "Pipeline", "Devices and links"


def number_from(least: float) -> Callable[[str], float]:
    """Return what reads a number from ``least`` to a million millions."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= _MOST_NUMBER:
            raise typer.BadParameter(f"{text!r} is no number from {least:g} to {_MOST_NUMBER:g}")
        return value

    return parse


def flag_error(flag: str, message: str) -> typer.BadParameter:
    """Return the error that names a flag and ends the command with status 2."""
    return typer.BadParameter(message, param_hint=f"'{flag}'")


def check_output(flag: str, file: Path, endings: Sequence[str]) -> None:
    """Raise the error of a flag whose ``file`` has another ending or could not be written."""
    if file.suffix not in endings:
        words = f"one of {', '.join(endings)}" if len(endings) > 1 else endings[0]
        raise flag_error(flag, f"{file} must end in {words}")
    if why := cannot_write(file):
        raise flag_error(flag, f"{file}: cannot be written ({why})")


MicroBatches = Annotated[
    int | None,
    typer.Option(
        "--microbatches",
        min=1,
        max=_MOST,
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
        "--seq1f1b-turn",
        min=1,
        max=_MOST,
        help="Interleaved: sub-sequences that go through a chunk in a turn. [default: the number "
        "of stages]",
        rich_help_panel=_PIPELINE,
    ),
]
BackwardRatio = Annotated[
    float,
    typer.Option(
        "--backward-ratio",
        parser=number_from(0.01),
        metavar="NUMBER",
        help="Time of a backward over that of its forward, where no GPU is named.",
        rich_help_panel=_DEVICE,
    ),
]
Tflops = Annotated[
    float | None,
    typer.Option(
        "--tflops",
        parser=number_from(1e-6),
        metavar="NUMBER",
        help="TFLOP/s that a stage reaches on the model, instead of a GPU's kernel curves.",
        rich_help_panel=_DEVICE,
    ),
]
Latency = Annotated[
    float | None,
    typer.Option(
        "--latency",
        parser=number_from(0.0),
        metavar="NUMBER",
        help="From a stage to the next: in seconds with a model or trace, else in forwards of a "
        "stage on one micro-batch. [default: the GPU's, or 0]",
        rich_help_panel=_DEVICE,
    ),
]
Bandwidth = Annotated[
    float | None,
    typer.Option(
        "--bandwidth",
        parser=number_from(1e-6),
        metavar="NUMBER",
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
