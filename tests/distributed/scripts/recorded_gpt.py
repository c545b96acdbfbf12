"""``plain_gpt.py`` that stores losses, gradient norms and a digest of its weights at the end.

The environment names the folder, RECORDS, in which each rank writes its file. With DEVICE_ONLY
there, Megatron runs on the CPU without anything of Seq1F1B.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("DEVICE_ONLY"):
    from megatron.adaptor.cpu import device

    device.install()

    from megatron.adaptor.patches import apply_all
    from megatron.adaptor.without_engine import fallbacks

    apply_all(fallbacks.patches())
else:
    from megatron.adaptor import install

    install()

import plain_gpt
import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

RECORD = {"losses": [], "norms": []}
models = []
log = training.training_log
build = training.setup_model_and_optimizer


def training_log(loss_dict, *args, **kwargs):
    RECORD["losses"].append({key: value.item() for key, value in loss_dict.items()})
    RECORD["norms"].append(float(args[6]))
    return log(loss_dict, *args, **kwargs)


def setup_model_and_optimizer(*args, **kwargs):
    built = build(*args, **kwargs)
    models.extend(built[0])
    return built


training.training_log = training_log
training.setup_model_and_optimizer = setup_model_and_optimizer

if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args),
        plain_gpt.datasets_provider,
        ModelType.encoder_or_decoder,
        plain_gpt.forward_step,
        plain_gpt.model_provider,
    )
    digest = hashlib.sha256()
    for chunk in models:
        for name, parameter in sorted(chunk.named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    RECORD["weights"] = digest.hexdigest()
    (Path(os.environ["RECORDS"]) / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(RECORD))
