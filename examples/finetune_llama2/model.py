"""The model to start from: a tiny random one, or the first layers of a given one."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from seq1f1b.ulysses.training.tokenizer import byte_tokenizer

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def make_tiny(folder: Path) -> Path:
    """Write a random Llama of 8 layers and a tokenizer of bytes."""
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None  # as Llama's own
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # models often have more rows than their tokenizer words
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_fewer_layers(source: str, num_layers: int, folder: Path) -> Path:
    """Write the model of the folder ``source`` with its first layers only.

    Raises OSError for weights that are no safetensors in a local folder.
    """
    folder.mkdir()
    for file in Path(source).iterdir():
        if file.suffix in (".json", ".model", ".jinja") and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise OSError(f"{source}: no safetensors there: num_layers must be the model's")
    kept = {}
    for file in files:
        for name, tensor in load_file(file).items():
            match = _LAYER.match(name)
            if match is None or int(match[1]) < num_layers:
                kept[name] = tensor
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
