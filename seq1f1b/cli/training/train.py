"""``seq1f1b train``: a Hugging Face model on long sequences, by a recipe."""

import logging
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seq1f1b.cli.options import flag_error
from seq1f1b.processes import end_now

if TYPE_CHECKING:
    from seq1f1b.ulysses.training.recipe import Recipe

Config = Annotated[
    str, typer.Argument(metavar="NAME_OR_PATH", help="A recipe: a name of list-cfg, or a file.")
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        help="Folder of logs, checkpoints and the trained model. [default: work_dirs/NAME]",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="Continue from the latest checkpoint of the folder, or from this one.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed, instead of the recipe's.")]
Launcher = Annotated[
    str,
    typer.Option(
        "--launcher",
        help="What started the processes: none (reads NPROC_PER_NODE and NNODES), pytorch "
        "(torchrun) or slurm (srun).",
    ),
]
DeepSpeed = Annotated[
    str | None,
    typer.Option(
        "--deepspeed",
        metavar="NAME|FILE.json",
        help="Let DeepSpeed divide the model: deepspeed_zero1, 2, 3, 2_offload, 3_offload or a "
        "file. [default: FSDP2]",
    ),
]


def train(
    config: Config,
    deepspeed: DeepSpeed = None,
    launcher: Launcher = "none",
    work_dir: WorkDir = None,
    resume: Resume = None,
    seed: Seed = None,
) -> None:
    """Train a Hugging Face model by a recipe.

    Starts as many processes as NPROC_PER_NODE says, on NNODES nodes (with NODE_RANK, ADDR and
    PORT), or runs in those that torchrun or srun started.
    """
    from seq1f1b.ulysses.training.catalogue import recipe_path
    from seq1f1b.ulysses.training.launch import LAUNCHERS, LaunchError, torchrun_command
    from seq1f1b.ulysses.training.recipe import RecipeError, read_recipe

    if launcher not in LAUNCHERS:
        raise flag_error("--launcher", f"{launcher} is none of {', '.join(LAUNCHERS)}")
    try:
        path = recipe_path(config)
        recipe = read_recipe(path)
        options = {
            "--deepspeed": deepspeed,
            "--work-dir": work_dir,
            "--resume": resume,
            "--seed": seed,
        }
        again = [f"{name}={value}" for name, value in options.items() if value is not None]
        command = None
        if launcher == "none":
            command = torchrun_command(["train", config, *again], os.environ)
    except RecipeError as error:
        raise flag_error("NAME_OR_PATH", str(error)) from None
    except LaunchError as error:
        raise typer.BadParameter(str(error)) from None
    if command is not None:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    folder = work_dir or Path("work_dirs") / path.stem
    run(recipe, folder, launcher, resume, deepspeed)


def run(
    recipe: "Recipe", folder: Path, launcher: str, resume: str | None, deepspeed: str | None
) -> None:
    """Join the other processes and train; what the recipe asks in vain ends it with status 2."""
    import torch.distributed as dist

    from seq1f1b.agreement import RanksDifferError, wait_for_first
    from seq1f1b.ulysses.errors import UnsupportedModelError
    from seq1f1b.ulysses.training.checkpoints import SavingError
    from seq1f1b.ulysses.training.data import DataError
    from seq1f1b.ulysses.training.launch import LaunchError, init_dist
    from seq1f1b.ulysses.training.recipe import RecipeError
    from seq1f1b.ulysses.training.trainer import train as run_recipe

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank = 0
    try:
        place = init_dist(launcher)
        rank = place.rank
        model = run_recipe(recipe, folder, resume, deepspeed)
        if rank == 0 and recipe.checkpoints.export:
            typer.echo(f"wrote {model}")
    except (
        *(RecipeError, DataError, LaunchError, UnsupportedModelError, RanksDifferError),
        *(SavingError, FloatingPointError),
    ) as error:
        typer.echo(f"{wait_for_first(rank)}error: {error}", err=True)
        raise typer.Exit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if place.world_size > 1:
        end_now(0)
