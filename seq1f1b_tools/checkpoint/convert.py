"""Convert models between Hugging Face's folders and Megatron's torch_dist checkpoints.

seq1f1b-convert hf-to-megatron --hf DIR --output DIR
seq1f1b-convert megatron-to-hf --megatron DIR --hf-config DIR --output DIR
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from seq1f1b_tools.checkpoint import huggingface, torch_dist
from seq1f1b_tools.checkpoint.families import Shape, read_shape
from seq1f1b_tools.checkpoint.flags import arguments, megatron_flags, padded, tokens
from seq1f1b_tools.checkpoint.hub import folder_of
from seq1f1b_tools.checkpoint.mapping import Piece, pieces
from seq1f1b_tools.checkpoint.problem import ConversionError, one_line
from seq1f1b_tools.checkpoint.torch_dist_reader import Checkpoint
from seq1f1b_tools.interrupts import Interrupted, interruptible
from seq1f1b_tools.whole_folder import FolderError, whole_folder

FLAGS_FILE = "megatron_flags.txt"
_GIB = 1 << 30
_MOST_GIB = 1e6
_MTP = "mtp."

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
_Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model on the Hugging Face hub.")
]
_DropMtp = Annotated[
    bool, typer.Option("--drop-mtp", help="Omit the layers for multi-token prediction.")
]
_Dtype = Annotated[
    Precision | None, typer.Option(help="Type of the weights. [default: each keeps its own]")
]


@app.command("hf-to-megatron")
def hf_to_megatron(
    hf: Annotated[
        str,
        typer.Option(
            help="Folder with config.json and *.safetensors or pytorch_model.bin, or a name on "
            "the Hugging Face hub, such as Qwen/Qwen3-8B."
        ),
    ],
    output: _Output,
    dtype: _Dtype = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pads the vocabulary to a multiple of this number, which Megatron divides it by.",
        ),
    ] = 1,
    transformer_impl: Annotated[
        Implementation,
        typer.Option(help="Megatron's layers that will load it; they name some norms differently."),
    ] = Implementation.LOCAL,
    drop_mtp: _DropMtp = False,
    revision: _Revision = None,
) -> None:
    """Make a torch_dist checkpoint that Megatron loads under any TP, PP, VPP and EP."""
    with _reported():
        folder = folder_of(hf, revision, with_weights=True)
        shape = read_shape(folder)
        source = huggingface.Source(folder)
        if shape.is_tied and source.unties():
            _say("config.json ties the output layer to the embedding, but its weights are others")
            shape = replace(shape, is_tied=False)
        source.ignore(_mtp_layers(shape), is_meant=drop_mtp)
        parts = source.check(
            pieces(shape, transformer_engine=transformer_impl == "transformer_engine")
        )
        dtypes = _types(source, parts, dtype)
        flags = megatron_flags(shape, padded(shape.vocabulary, tensor_parallel))
        words = "".join(f"{word}\n" for word in tokens(flags))

        def write(folder: Path, advance: Callable[[], None]) -> None:
            def make(piece: Piece) -> Tensor:
                advance()
                return piece.join([source.read(name) for name in piece.names])

            torch_dist.write(folder, parts, make, dtypes, arguments(flags))
            (folder / FLAGS_FILE).write_text(words)

        _publish(output, len(parts), _num_bytes(parts, dtypes), write)
    if shape.window is not None:
        _say(
            f"--max-position-embeddings is {shape.positions}, the sliding window of this model: "
            "up to there it attends to everything, as Megatron does"
        )
    _say(f"Train with --load {output} --finetune --ckpt-format torch_dist and the flags in")
    _say(f"{output / FLAGS_FILE}, one word a line:")
    typer.echo(words, nl=False)


@app.command("megatron-to-hf")
def megatron_to_hf(
    megatron: Annotated[Path, typer.Option(help="Folder of a torch_dist checkpoint (--save).")],
    hf_config: Annotated[
        str,
        typer.Option(
            help="Folder with the model's config.json, and its tokenizer's files, or a name on "
            "the Hugging Face hub."
        ),
    ],
    output: _Output,
    dtype: _Dtype = None,
    max_shard_gib: Annotated[
        float, typer.Option(min=0.001, help="Largest size of a shard, in GiB.")
    ] = 4.0,
    transformer_impl: Annotated[
        Implementation | None,
        typer.Option(help="Megatron's layers that saved it. [default: detected]"),
    ] = None,
    drop_mtp: _DropMtp = False,
    revision: _Revision = None,
) -> None:
    """Make a Hugging Face folder of the latest checkpoint in a folder."""
    with _reported():
        if not max_shard_gib <= _MOST_GIB:  # nor is NaN
            raise ConversionError(f"--max-shard-gib {max_shard_gib} is not a size")
        like = folder_of(hf_config, revision, with_weights=False)
        shape = read_shape(like)
        checkpoint = Checkpoint(megatron)
        changed: dict[str, Any] = {}
        if shape.is_tied and "output_layer.weight" in checkpoint:
            shape, changed = replace(shape, is_tied=False), {"tie_word_embeddings": False}
            _say("the checkpoint has an output layer of its own: config.json no longer ties it")
        checkpoint.ignore((_MTP,), is_meant=drop_mtp)
        parts = checkpoint.check(_pieces_of(checkpoint, shape, transformer_impl))
        if padding := checkpoint.padding(parts):
            _say(f"{padding} rows beyond the vocabulary of config.json are left out")
        changed |= _new_type(like, checkpoint, parts, dtype)

        def tensors(advance: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
            for piece in parts:
                advance()
                split = piece.split(checkpoint.read(piece))
                for name, tensor in zip(piece.names, split, strict=True):
                    new_type = None if piece.keeps_type or dtype is None else dtype.dtype
                    yield name, tensor.to(new_type)

        def write(folder: Path, advance: Callable[[], None]) -> None:
            huggingface.write(
                folder,
                like,
                tensors(advance),
                shard_bytes=int(max_shard_gib * _GIB),
                changed=changed,
            )

        _publish(output, len(parts), checkpoint.num_bytes(parts), write)


def _types(
    source: huggingface.Source, parts: list[Piece], wanted: Precision | None
) -> dict[str, torch.dtype]:
    """Return the type of each of Megatron's tensors: the narrowest that holds what it is made of.

    A bias that only Megatron has is stored as the first tensor is.
    """
    found: dict[str, torch.dtype] = {}
    for piece in parts:
        own = source.dtype(piece)
        if piece.keeps_type:
            own = torch.float32
        elif own is None:
            own = next(iter(found.values()))
        elif wanted is not None:
            own = wanted.dtype
        known = found.get(piece.key, own)
        found[piece.key] = torch.promote_types(known, own)
    return found


def _new_type(
    like: Path, checkpoint: Checkpoint, parts: list[Piece], wanted: Precision | None
) -> dict[str, str]:
    """Return the setting of config.json that says which type the weights have, if it changes."""
    settings = huggingface.read_settings(like)
    key = next((name for name in ("dtype", "torch_dtype") if name in settings), "dtype")
    stored = checkpoint.dtypes(piece for piece in parts if not piece.keeps_type)
    if wanted is not None:
        name = wanted.value
    elif key in settings and len(stored) == 1:
        name = str(stored.pop()).removeprefix("torch.")
    else:
        return {}
    return {} if settings.get(key) == name else {key: name}


def _num_bytes(parts: list[Piece], dtypes: dict[str, torch.dtype]) -> int:
    return sum(math.prod(piece.sizes) * dtypes[piece.key].itemsize for piece in parts)


def _mtp_layers(shape: Shape) -> tuple[str, ...]:
    return tuple(
        f"model.layers.{layer}." for layer in range(shape.layers, shape.layers + shape.mtp_layers)
    )


def _pieces_of(
    checkpoint: Checkpoint, shape: Shape, implementation: Implementation | None
) -> Iterator[Piece]:
    """Return the pieces as the layers name them that saved the checkpoint."""
    if implementation is not None:
        return pieces(shape, transformer_engine=implementation == "transformer_engine")
    is_local = all(piece.key in checkpoint for piece in pieces(shape))
    return pieces(shape, transformer_engine=not is_local)


def _say(text: str) -> None:
    _console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _reported() -> Iterator[None]:
    """End the program with the message of a ConversionError; let interruptions clean up too."""
    try:
        with interruptible():
            yield
    except (ConversionError, FolderError, OSError) as error:
        _console.print("error:", style="bold red", end=" ")
        _say(str(error) if not isinstance(error, OSError) else one_line(error))
        raise typer.Exit(2) from None
    except Interrupted as error:
        _say(f"{error}: ended; nothing is left")
        raise typer.Exit(error.exit_code) from None


def _publish(
    output: Path, total: int, num_bytes: int, write: Callable[[Path, Callable[[], None]], None]
) -> None:
    """Let ``write`` fill a folder of ``num_bytes`` that appears as ``output`` when it is whole."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with whole_folder(output, num_bytes) as partial, Progress(*columns, console=_console) as shown:
        task = shown.add_task("tensors", total=total)
        write(partial, lambda: shown.advance(task))
