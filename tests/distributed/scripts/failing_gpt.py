"""``plain_gpt.py`` with a fault: one rank raises in the forward of its fifth batch."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import plain_gpt
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

calls = 0


def forward_step(data_iterator, model):
    global calls
    calls += 1
    if calls == 5 and torch.distributed.get_rank() == 1:
        raise RuntimeError(f"cosmic ray at {time.time()}")
    return plain_gpt.forward_step(data_iterator, model)


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args),
        plain_gpt.datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        plain_gpt.model_provider,
    )
