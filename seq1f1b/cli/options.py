"""The flags that the commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from seq1f1b.planner.catalogue import ScheduleName

_PIPELINE, _MODEL, _DEVICE = "Pipeline", "Model (for times in seconds)", "Devices and links"


class BalanceName(StrEnum):
    """Where to cut a sequence."""

    average = "average"
    uniform_comp = "uniform_comp"


def flag_error(flag: str, message: str) -> typer.BadParameter:
    """Return the error that names a flag and ends the command with status 2."""
    return typer.BadParameter(message, param_hint=f"'{flag}'")


Stages = Annotated[
    int | None,
    typer.Option("--stages", min=1, help="Pipeline stages.", rich_help_panel=_PIPELINE),
]
Chunks = Annotated[
    int | None,
    typer.Option("--chunks", min=1, help="Model chunks a stage.", rich_help_panel=_PIPELINE),
]
MicroBatches = Annotated[
    int | None,
    typer.Option("--microbatches", min=1, help="Micro-batches.", rich_help_panel=_PIPELINE),
]
Splits = Annotated[
    int | None,
    typer.Option(
        "--splits", min=1, help="Sub-sequences of a micro-batch.", rich_help_panel=_PIPELINE
    ),
]
ScheduleOption = Annotated[
    ScheduleName | None,
    typer.Option(
        "--schedule",
        help="Which schedule; chosen by --chunks and --splits unless given.",
        rich_help_panel=_PIPELINE,
    ),
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group",
        min=1,
        help="Interleaved: sub-sequences that go through a chunk in a turn. [default: --stages]",
        rich_help_panel=_PIPELINE,
    ),
]
MaxLive = Annotated[
    int | None,
    typer.Option(
        "--max-live",
        min=1,
        help="greedy: sub-sequences (on one model chunk each) that a stage may hold from their "
        "forward to the end of their backward. [default: as the first stage under 1F1B]",
        rich_help_panel=_PIPELINE,
    ),
]
SeqLength = Annotated[
    int | None,
    typer.Option("--seq-length", min=1, help="Tokens of a sequence.", rich_help_panel=_MODEL),
]
HiddenSize = Annotated[
    int | None,
    typer.Option("--hidden-size", min=1, help="Width of the model.", rich_help_panel=_MODEL),
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", min=1, help="Transformer layers in all.", rich_help_panel=_MODEL),
]
Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Attention heads.", rich_help_panel=_MODEL),
]
QueryGroups = Annotated[
    int | None,
    typer.Option(
        "--query-groups",
        min=1,
        help="Key and value heads. [default: --heads]",
        rich_help_panel=_MODEL,
    ),
]
FfnHiddenSize = Annotated[
    int | None,
    typer.Option(
        "--ffn-hidden-size",
        min=1,
        help="Width of the MLP. [default: 4 x --hidden-size]",
        rich_help_panel=_MODEL,
    ),
]
MicroBatchSize = Annotated[
    int,
    typer.Option(
        "--micro-batch-size", min=1, help="Sequences of a micro-batch.", rich_help_panel=_MODEL
    ),
]
BalanceMethod = Annotated[
    BalanceName,
    typer.Option(
        "--balance-method",
        help="Cut a sequence evenly in tokens (average) or in computation (uniform_comp).",
        rich_help_panel=_MODEL,
    ),
]
Multiple = Annotated[
    int,
    typer.Option(
        "--multiple",
        min=1,
        help="Every sub-sequence is a multiple of so many tokens.",
        rich_help_panel=_MODEL,
    ),
]
BackwardRatio = Annotated[
    float,
    typer.Option(
        "--backward-ratio",
        min=0.01,
        help="Time of a backward over that of its forward.",
        rich_help_panel=_DEVICE,
    ),
]
Tflops = Annotated[
    float,
    typer.Option(
        "--tflops",
        min=1e-6,
        help="TFLOP/s that a stage reaches on the model.",
        rich_help_panel=_DEVICE,
    ),
]
Latency = Annotated[
    float,
    typer.Option(
        "--latency",
        min=0.0,
        help="From a stage to the next: in seconds with a model or trace, else in forwards of a "
        "stage on one micro-batch.",
        rich_help_panel=_DEVICE,
    ),
]
Bandwidth = Annotated[
    float | None,
    typer.Option(
        "--bandwidth",
        min=1e-6,
        help="GB/s from a stage to the next; needs a model. [default: no limit]",
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
