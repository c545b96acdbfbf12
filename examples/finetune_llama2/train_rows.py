"""Megatron's training on rows that are packed already: pretrain_gpt.py with another data set."""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import megatron.adaptor

megatron.adaptor.install()  # before anything else of Megatron's

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch import Tensor
from torch.utils.data import Dataset

import pretrain_gpt
from seq1f1b.ulysses.training.data import Order


class Rows(Dataset):
    """``num_samples`` rows of a file, shuffled anew in every epoch."""

    def __init__(self, file: str, num_samples: int, seed: int) -> None:
        self.rows: dict[str, Tensor] = torch.load(file, mmap=True)
        self.num_samples = num_samples
        self.order = Order(len(self.rows["tokens"]), 1, seed)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (row,) = self.order.step(index)
        return {name: tensor[row] for name, tensor in self.rows.items()}


def datasets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> list:
    """Training rows; there is no validation."""
    args = get_args()
    return [Rows(args.data_path[0], num_samples[0], args.seed), None, None]


datasets.is_distributed = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(args, pretrain_gpt.model_config(args)),
        datasets,
        ModelType.encoder_or_decoder,
        pretrain_gpt.forward_step,
        get_embedding_ranks=pretrain_gpt.get_embedding_ranks,
    )
