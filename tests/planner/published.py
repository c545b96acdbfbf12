"""What the authors of Seq1F1B published, and the settings behind it.

``PEAK`` is the memory in GiB of the fullest stage, ``MEAN`` the mean over stages; None: out of
memory. Columns are ``SCHEDULES``. ``THROUGHPUT`` is in tokens/s of 32 GPUs, by length and number of
micro-batches.
"""

from typing import Any

SCHEDULES = ("1f1b", "1f1b-interleaved", "seq1f1b", "seq1f1b-interleaved")
LIMIT_GIB = 76.8

# layers, hidden size, heads, tensor-parallel size, stages
SHAPES = {
    "2.7B": (32, 2560, 32, 1, 8),
    "7B": (32, 4096, 32, 8, 4),
    "13B": (40, 5120, 40, 8, 4),
    "30B": (64, 6144, 64, 8, 8),
}

PEAK: dict[tuple[str, int], tuple[float | None, ...]] = {
    ("2.7B", 16384): (51.40, 70.95, 29.85, 29.70),
    ("2.7B", 24576): (74.30, None, 41.45, 41.90),
    ("2.7B", 32768): (None, None, 53.10, 54.45),
    ("7B", 32768): (28.00, 34.20, 18.90, 16.35),
    ("7B", 65536): (51.40, 62.90, 34.30, 28.45),
    ("7B", 131072): (None, None, 69.80, 57.55),
    ("13B", 32768): (44.20, 53.25, 29.70, 25.80),
    ("13B", 49152): (64.30, 76.45, 42.35, 35.90),
    ("13B", 65536): (66.85, None, 51.60, 42.95),
    ("30B", 32768): (71.40, None, 37.60, 38.65),
    ("30B", 49152): (None, None, 54.70, 55.55),
    ("30B", 65536): (None, None, 67.50, 66.90),
}

ODD = {("13B", 65536, "1f1b")}
"""Below the same schedule's line through shorter lengths, which leads to 84."""

MEAN: dict[tuple[str, int], tuple[float | None, ...]] = {
    ("2.7B", 16384): (32.62, 51.63, 22.74, 23.70),
    ("2.7B", 24576): (46.52, None, 32.19, 33.76),
    ("2.7B", 32768): (None, None, 41.59, 43.47),
    ("7B", 32768): (19.64, 25.29, 15.85, 13.80),
    ("7B", 65536): (35.32, 45.89, 29.78, 23.17),
    ("7B", 131072): (None, None, 57.20, 46.64),
}

THROUGHPUT: dict[tuple[int, int], tuple[float | None, ...]] = {
    (32768, 8): (48189, 52964, 53485, 47232),
    (32768, 16): (55333, 56304, 55765, 46195),
    (65536, 8): (37343, 41677, 43297, 40908),
    (65536, 16): (43063, 44712, None, 40990),  # 33367 contradicts its own TFLOP/s
    (131072, 8): (None, None, 30392, 30023),
    (131072, 16): (None, None, 31584, 30362),
}


def options_of(model: str, length: int, micro_batches: int | None = None) -> dict[str, Any]:
    """Return the options of a published setting, without its schedule."""
    layers, hidden, heads, tensor, stages = SHAPES[model]
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": length,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": stages,
        "sequence_parallel": True,
        "use_distributed_optimizer": True,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "vocab_size": 50257,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "micro_batch_size": 1,
        "global_batch_size": micro_batches or 2 * stages,
        "bf16": True,
    }
