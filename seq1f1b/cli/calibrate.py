"""``seq1f1b calibrate``: measure this machine for the planner."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from seq1f1b.cli.options import check_output, flag_error
from seq1f1b.planner.gpu import THIS_MACHINE, calibrated_file


def calibrate(
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            help="Ranks that measure at once. [default: the GPUs of this machine, or its cores]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help=f"Where to write the description. [default: where --gpu {THIS_MACHINE} looks]",
        ),
    ] = None,
) -> None:
    """Measure this machine's kernels and links, with all local ranks busy at once.

    Takes one or two minutes. The result is a description file; --gpu this-machine plans with it.
    """
    from seq1f1b.planner import calibrate as measuring  # torch takes seconds to start

    path = output or calibrated_file()
    check_output("--output", path, [".yaml"])
    number = ranks or measuring.default_ranks()
    start = time.monotonic()
    with Console(stderr=True).status(f"measuring with {number} rank(s) ..."):
        description = measuring.calibrate(number)
    try:
        measuring.write(description, path)
    except OSError as error:
        raise flag_error("--output", f"{path}: cannot be written: {error}") from None
    typer.echo(f"{description.title}: measured in {time.monotonic() - start:.0f} s, wrote {path}")
