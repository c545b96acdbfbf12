"""The assumptions of ``seq1f1b plan-offload``, each an option."""

import math
from typing import Annotated, Any

import typer

from seq1f1b.cli.options import flag_error, number_from
from seq1f1b.offload.planning.case import Recomputation
from seq1f1b.offload.planning.machine import GB, Machine
from seq1f1b.planner.gpu import Gpu

_PANEL = "Assumptions"


def _rate(flag: str, text: str) -> Any:
    return typer.Option(
        flag,
        parser=number_from(1e-3),
        metavar="NUMBER",
        help=text,
        rich_help_panel=_PANEL,
    )


PeakFraction = Annotated[
    float,
    _rate("--peak-fraction", "What a GPU reaches of the peak that its data sheet names."),
]
Pcie = Annotated[float, _rate("--pcie-gb-s", "GB/s of a GPU's own link, one way.")]
Uplink = Annotated[
    float | None,
    _rate(
        "--root-gb-s",
        "GB/s of the link that the GPUs under a root share, one way. [default: as --pcie-gb-s]",
    ),
]
PerRoot = Annotated[
    int,
    typer.Option(
        "--gpus-per-root",
        min=1,
        help="GPUs under a root; 1: no link is shared.",
        rich_help_panel=_PANEL,
    ),
]
Crossed = Annotated[
    bool,
    typer.Option(
        "--cross-mapping",
        help="Neighbouring stages under different roots, as seq1f1b map-gpus orders GPUs.",
        rich_help_panel=_PANEL,
    ),
]
Host = Annotated[
    float | None,
    _rate(
        "--host-memory-gb-s",
        "GB/s of host memory that Adam reaches. [default: the GPU's description]",
    ),
]
Collectives = Annotated[
    float, _rate("--collectives-gb-s", "GB/s of ZeRO-Offload's collectives (bus bandwidth).")
]
Stages = Annotated[float, _rate("--stage-gb-s", "GB/s from a stage to the next.")]
Buckets = Annotated[
    float,
    typer.Option(
        "--bucket-gb",
        parser=number_from(0.0),
        metavar="NUMBER",
        help="GB of ZeRO-Offload's gradient buckets on a GPU: two of 5e8 elements by default.",
        rich_help_panel=_PANEL,
    ),
]
GradientCopy = Annotated[
    int,
    typer.Option(
        "--gradient-copy-bytes",
        min=0,
        max=4,
        help="Host bytes a parameter of the fp32 copy of the gradients that Adam makes.",
        rich_help_panel=_PANEL,
    ),
]
Recompute = Annotated[
    Recomputation,
    typer.Option(
        "--recompute",
        help="What backwards compute anew, unless Megatron's own options say it.",
        rich_help_panel=_PANEL,
    ),
]
Fp32Gradients = Annotated[
    bool,
    typer.Option(
        "--fp32-gradients",
        help="Gradients in fp32, Megatron's default, instead of --grad-reduce-in-bf16.",
        rich_help_panel=_PANEL,
    ),
]
MinTokens = Annotated[
    int,
    typer.Option(
        "--min-tokens",
        min=1,
        help="Tokens of an action; shorter ones are not searched: --peak-fraction would not hold.",
        rich_help_panel=_PANEL,
    ),
]


def make_machine(
    device: Gpu,
    num_gpus: int,
    *,
    peak_fraction: float,
    pcie: float,
    uplink: float | None,
    per_root: int,
    crossed: bool,
    host: float | None,
    collectives: float,
    stages: float,
    buckets: float,
    gradient_copy: int,
) -> Machine:
    """Return the machine that the options describe; rates are in GB/s."""
    if not 0 < peak_fraction <= 1 or math.isnan(peak_fraction):
        raise flag_error("--peak-fraction", f"{peak_fraction:g}: must be above 0 and at most 1")
    rates: dict[str, Any] = {} if host is None else {"host": host * GB}
    return Machine.of(
        device,
        num_gpus,
        peak_fraction=peak_fraction,
        pcie=pcie * GB,
        uplink=(pcie if uplink is None else uplink) * GB,
        per_root=per_root,
        crossed=crossed,
        collectives=collectives * GB,
        stages=stages * GB,
        buckets=buckets * GB,
        gradient_copy=gradient_copy,
        **rates,
    )
