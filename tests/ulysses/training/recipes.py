"""Recipes of small runs, and data made for them."""

import json
from pathlib import Path
from typing import Any

from seq1f1b.ulysses.training.recipe import Recipe, check_recipe

LENGTH = 96


def write_texts(folder: Path, count: int = 40) -> Path:
    """Write texts of various lengths as JSON lines; return the file."""
    path = folder / "texts.jsonl"
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(f"{number * k % 97} plus {k}" for k in range(1 + number % 9))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def content(source: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe as YAML gives it; a key such as ``training.steps`` changes one inside."""
    recipe: dict[str, Any] = {
        "sequence_parallel_size": 2,
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "tie_word_embeddings": True,
            },
            "dtype": "float32",
        },
        "data": {"source": str(source), "tokenizer": "bytes", "max_length": LENGTH},
        "training": {
            "steps": 6,
            "global_batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "weight_decay": 0.1,
        },
        "checkpoints": {"every": 3},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        section = recipe
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return recipe


def recipe(source: Path, **changes: Any) -> Recipe:
    """Return a recipe that is checked."""
    return check_recipe(content(source, **changes), "test")
