"""``seq1f1b ulysses plan``: what a step needs on each GPU, before it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from seq1f1b.cli.options import Json, flag_error
from seq1f1b.cli.ulysses.options import Model, RemoteCode

if TYPE_CHECKING:
    from seq1f1b.ulysses.account import Term

_TOO_LARGE = 1
_GIB = 2**30

Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a row.")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs.")]
Sp = Annotated[
    int | None, typer.Option("--sp", min=1, help="GPUs that share a row. [default: all]")
]
Device = Annotated[
    str, typer.Option("--gpu", help="GPU by name or file, as for seq1f1b plan; sets the limit.")
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows that a group computes at a time.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"], typer.Option("--dtype", help="What layers compute in.")
]
Recompute = Annotated[
    Literal["none", "layers", "offload"],
    typer.Option("--recompute", help="As memory.recompute of a recipe."),
]
LossTile = Annotated[
    int, typer.Option("--loss-tile", min=0, help="Tokens of a tile of logits; 0: all at once.")
]
MlpTile = Annotated[
    int, typer.Option("--mlp-tile", min=0, help="Tokens of a tile of MLPs; 0: all at once.")
]
UnitAtATime = Annotated[
    bool, typer.Option("--unit-at-a-time", help="Gather attention one head of keys at a time.")
]
Subsequences = Annotated[
    int, typer.Option("--subsequences", min=1, help="Parts of a row, one after the other.")
]
CpuOffload = Annotated[
    bool, typer.Option("--cpu-offload", help="Keep weights, gradients and optimizer on the host.")
]


def plan(
    model: Model,
    tokens: Tokens,
    gpus: Gpus = 8,
    sp: Sp = None,
    gpu: Device = "h100",
    rows: Rows = 1,
    dtype: Dtype = "bfloat16",
    recompute: Recompute = "layers",
    loss_tile: LossTile = 1024,
    mlp_tile: MlpTile = 0,
    unit_at_a_time: UnitAtATime = False,
    subsequences: Subsequences = 1,
    cpu_offload: CpuOffload = False,
    remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Print what a training step needs on each GPU, and what to switch on if it does not fit.

    An account of tensors by the model's own shape; nothing is run. Settings are those of a recipe's
    memory section for seq1f1b train, with its defaults.

    Exit status: 0 if the step fits or can be made to fit, 1 if no setting is enough.
    """
    from seq1f1b.planner.errors import DataFileError
    from seq1f1b.planner.gpu import gpu as load_gpu
    from seq1f1b.ulysses.account import Load, Shape, account, advise, host_bytes, peak
    from seq1f1b.ulysses.check import Source
    from seq1f1b.ulysses.training.recipe import MemorySettings

    size = sp or gpus
    if gpus % size:
        raise flag_error("--sp", f"{size} does not divide the {gpus} GPUs")
    try:
        device = load_gpu(gpu)
    except DataFileError as error:
        raise flag_error("--gpu", str(error)) from None
    try:
        shape = Shape.read(Source(model, remote_code))
    except ValueError as error:
        raise flag_error("MODEL_OR_CONFIG", str(error)) from None
    memory = MemorySettings(
        recompute=recompute,
        loss_tile=loss_tile or None,
        mlp_tile=mlp_tile or None,
        unit_at_a_time=unit_at_a_time,
        subsequences=subsequences,
        cpu_offload=cpu_offload,
    )
    load = Load(tokens, gpus, size, rows, {"bfloat16": 2, "float32": 4}[dtype])
    limit = device.usable_gib.value * _GIB
    changes = advise(shape, load, memory, limit)
    advised = memory.model_copy(update=changes or {})
    terms, later = account(shape, load, memory), account(shape, load, advised)
    figures = {
        "gib": {term.name: term.nbytes / _GIB for term in terms},
        "peak_gib": peak(terms) / _GIB,
        "limit_gib": limit / _GIB,
        "host_gib": host_bytes(shape, load, memory) / _GIB,
        "change": changes,
        "peak_gib_changed": peak(later) / _GIB,
        "host_gib_changed": host_bytes(shape, load, advised) / _GIB,
    }
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
    else:
        _print(terms, later, figures, f"{device.title}, {figures['limit_gib']:.1f} GiB usable")
    if changes is None:
        raise typer.Exit(_TOO_LARGE)


def _print(terms: "list[Term]", later: "list[Term]", figures: dict[str, Any], title: str) -> None:
    console = Console(highlight=False)
    changes = figures["change"]
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("GiB on one GPU", overflow="fold")
    table.add_column("as given", justify="right")
    if changes:
        table.add_column("changed", justify="right")
    names = dict.fromkeys(term.name for term in [*terms, *(later if changes else [])])
    columns = [{t.name: t.nbytes / _GIB for t in each} for each in (terms, later)]
    for name in names:
        cells = [f"{c[name]:.2f}" if name in c else "-" for c in columns]
        table.add_row(name, *(cells if changes else cells[:1]))
    peaks = [f"{figures['peak_gib']:.2f}", f"{figures['peak_gib_changed']:.2f}"]
    table.add_row("peak (of a layer and the logits, the larger)", *peaks[: len(table.columns) - 1])
    hosts = [f"{figures['host_gib']:.2f}", f"{figures['host_gib_changed']:.2f}"]
    table.add_row("in host memory", *hosts[: len(table.columns) - 1], style="dim")
    console.print(table)
    if changes is None:
        console.print(f"[bold red]Too much[/] for {title}, whatever is set: use more GPUs.")
    elif changes:
        console.print(f"[bold red]Too much[/] for {title}. To make it fit, in the recipe:\n")
        console.print("memory:")
        for name, value in changes.items():
            console.print(f"  {name}: {str(value).lower()}")
    else:
        console.print(f"[green]Fits[/] {title}.")
