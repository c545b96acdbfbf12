"""Convert Llama, Qwen2, Qwen3 and Mixtral between Hugging Face's safetensors and Megatron.

python tools/checkpoint/convert.py hf-to-megatron --hf DIR --output DIR
python tools/checkpoint/convert.py megatron-to-hf --megatron DIR --hf-config DIR --output DIR
"""

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from seq1f1b_tools.checkpoint import huggingface, torch_dist
from seq1f1b_tools.checkpoint.families import read_shape
from seq1f1b_tools.checkpoint.mapping import Piece, pieces
from seq1f1b_tools.checkpoint.problem import ConversionError
from seq1f1b_tools.interrupts import Interrupted, interruptible

FLAGS_FILE = "megatron_flags.txt"
_NAMES = {"--norm-epsilon": "layernorm_epsilon"}
_GIB = 1 << 30

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
_console = Console(stderr=True)


class Precision(StrEnum):
    """Types that weights are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        """Torch's name for it."""
        return getattr(torch, self.value)


class Implementation(StrEnum):
    """Values of Megatron's --transformer-impl."""

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


_Output = Annotated[Path, typer.Option(help="Folder to make; it must not exist.")]
_Impl = Annotated[
    Implementation,
    typer.Option(help="Megatron's layers, which name one norm of models with experts differently."),
]


@app.command("hf-to-megatron")
def hf_to_megatron(
    hf: Annotated[Path, typer.Option(help="Folder with config.json and *.safetensors.")],
    output: _Output,
    dtype: Annotated[
        Precision | None, typer.Option(help="Type of the weights; default: as they are.")
    ] = None,
    transformer_impl: _Impl = Implementation.LOCAL,
) -> None:
    """Make a torch_dist checkpoint that Megatron loads under any TP, PP, VPP and EP."""
    with _reported():
        shape = read_shape(hf)
        parts = pieces(shape, transformer_engine=transformer_impl == "transformer_engine")
        source = huggingface.Source(hf)
        source.check(parts, is_tied=shape.is_tied)
        flags = shape.flags()

        def write(folder: Path, advance: Callable[[], None]) -> None:
            def make(piece: Piece) -> Tensor:
                advance()
                return piece.join([source.read(name) for name in piece.names])

            precision = source.dtype if dtype is None else dtype.dtype
            torch_dist.write(folder, parts, make, precision, _arguments(flags))
            (folder / FLAGS_FILE).write_text(_command_line(flags) + "\n")

        _publish(output, len(parts), write)
    _console.print(f"Train with [bold]--load {output} --finetune --ckpt-format torch_dist[/] and")
    typer.echo(_command_line(flags))


@app.command("megatron-to-hf")
def megatron_to_hf(
    megatron: Annotated[Path, typer.Option(help="Folder of a torch_dist checkpoint (--save).")],
    hf_config: Annotated[
        Path, typer.Option(help="Folder with the model's config.json, and its tokenizer's files.")
    ],
    output: _Output,
    dtype: Annotated[
        Precision | None, typer.Option(help="Type of the weights; default: as they are.")
    ] = None,
    max_shard_gib: Annotated[float, typer.Option(min=0.001, help="Most of a shard, in GiB.")] = 4.0,
    transformer_impl: _Impl = Implementation.LOCAL,
) -> None:
    """Make a Hugging Face folder of the latest checkpoint in a folder."""
    with _reported():
        shape = read_shape(hf_config)
        parts = pieces(shape, transformer_engine=transformer_impl == "transformer_engine")
        checkpoint = torch_dist.Checkpoint(megatron)
        padding = checkpoint.check(parts)
        if padding:
            _console.print(f"{padding} rows beyond the vocabulary of config.json are left out")

        def write(folder: Path, advance: Callable[[], None]) -> None:
            def tensors() -> Iterator[tuple[str, Tensor]]:
                for piece in parts:
                    advance()
                    whole = checkpoint.read(piece)
                    for name, tensor in zip(piece.names, piece.split(whole), strict=True):
                        yield name, tensor if dtype is None else tensor.to(dtype.dtype)

            huggingface.write(folder, hf_config, tensors(), shard_bytes=int(max_shard_gib * _GIB))

        _publish(output, len(parts), write)


@contextmanager
def _reported() -> Iterator[None]:
    """End the program with the message of a ConversionError; let interruptions clean up too."""
    try:
        with interruptible():
            yield
    except (ConversionError, OSError) as error:
        _console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except Interrupted as error:
        _console.print(f"{error}: ended; nothing is left")
        raise typer.Exit(error.exit_code) from None


def _publish(output: Path, total: int, write: Callable[[Path, Callable[[], None]], None]) -> None:
    """Let ``write`` fill a folder beside ``output``, and rename it when it is whole."""
    if output.exists():
        raise ConversionError(f"{output} exists: choose another --output, or remove it")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=_console) as progress:
            task = progress.add_task("tensors", total=total)
            write(partial, lambda: progress.advance(task))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _command_line(flags: dict[str, Any]) -> str:
    words = [flag if value is True else f"{flag} {value}" for flag, value in flags.items()]
    return shlex.join(" ".join(words).split())


def _arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """Return ``flags`` as the attributes that Megatron parses them to."""
    named = {
        _NAMES.get(flag, flag.removeprefix("--").replace("-", "_")): value
        for flag, value in flags.items()
        if flag != "--disable-bias-linear"
    }
    return named | {"add_bias_linear": False}
