"""Documents with masked prompts, packed into rows for Megatron's way of packed sequences."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from seq1f1b.ulysses.labels import IGNORED
from seq1f1b.ulysses.training.data import DataError, prepare_rows
from seq1f1b.ulysses.training.recipe import DataSettings


def write_rows(source: str, tokenizer: Any, length: int, folder: Path) -> Path:
    """Encode and pack ``source``, and write ``folder``/rows.pt. Raises DataError.

    A document and its summary are a prompt and its answer, which alone is learned, with the end of
    the sequence; of messages what the assistant says. Each entry is ``[rows, length]``; cu_seqlens
    is ``[rows, length + 1]``: the boundaries of the documents, filled up with ``length``.
    """
    try:
        settings = DataSettings(
            source=source,
            prompt_key="document",
            answer_key="summary",
            max_length=length,
            too_long="drop",
        )
    except ValidationError as error:
        raise DataError(f"dataset {source}: {error}") from None
    packed = prepare_rows(settings, tokenizer, str(tokenizer.name_or_path), folder / "encoded")
    samples = []
    for number, row in enumerate(packed.rows):
        batch = packed.batch([number])
        held = batch.input_ids.shape[1]
        padding = (0, length - held)
        tokens = torch.nn.functional.pad(batch.input_ids[0], padding)
        labels = torch.nn.functional.pad(batch.labels[0, 1:], (0, length - held + 1), value=IGNORED)
        bounds = [0]
        for piece in row:
            bounds.append(bounds[-1] + piece.length)
        positions = torch.nn.functional.pad(batch.position_ids[0], padding)
        positions[held:] = torch.arange(length - held)  # padding is a document of its own
        boundaries = torch.full((length + 1,), length, dtype=torch.int32)
        boundaries[: len(bounds)] = torch.tensor(bounds, dtype=torch.int32)
        samples.append(
            {
                "tokens": tokens,
                "labels": labels.clamp(min=0),
                "loss_mask": (labels != IGNORED).float(),
                "position_ids": positions,
                "cu_seqlens": boundaries,
                "max_seqlen": boundaries.diff().max(),
            }
        )
    file = folder / "rows.pt"
    torch.save({name: torch.stack([one[name] for one in samples]) for name in samples[0]}, file)
    return file
