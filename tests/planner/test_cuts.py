"""Cuts for the shortest step, and within a cap."""

import pytest

from seq1f1b.planner.chunks import chunk_operations
from seq1f1b.planner.cuts import capped_cuts, fastest_cut
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.memory import trace_memory
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime
from seq1f1b.simulate import Costs, simulate

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "padded_vocab_size": 4096,
    "seq_length": 4096,
    "pipeline_model_parallel_size": 2,
    "global_batch_size": 4,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "seq1f1b_splits": 4,
}


def seconds(setting):
    costs = Costs.of_chunks(chunk_operations(setting), setting.lengths, flops_per_second=1e12)
    return simulate(setting.schedule(), costs).step_time


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("length", [4096, 16384])
def test_the_fastest_cut_beats_both_balance_methods(micro_batches, length):
    options = MODEL | {"global_batch_size": micro_batches, "seq_length": length}
    methods = [
        seconds(resolve(options | {"seq1f1b_balance_method": method}))
        for method in ("average", "uniform_comp")
    ]
    best = fastest_cut(resolve(options), seconds)
    assert sum(best.lengths) == length
    assert seconds(best) <= min(methods) * (1 + 1e-9)


def test_lengths_stay_within_a_cap_and_are_multiples():
    setting = resolve(MODEL | {"seq_length": 16384, "seq1f1b_multiple": 128})
    longest = max(setting.lengths)
    for cut in capped_cuts(setting):
        assert sum(cut) == 16384
        assert all(length % 128 == 0 for length in cut)
        assert max(cut) <= longest
    capped = fastest_cut(setting, seconds, longest=4608)
    assert max(capped.lengths) <= 4608


def test_a_cap_trades_time_for_memory():
    options = MODEL | {"seq_length": 65536, "pipeline_model_parallel_size": 4, "num_layers": 8}
    setting, profile = resolve(options | {"seq1f1b_multiple": 128}), runtime("current")
    free = trace_memory(setting, profile).peak_gib
    even = list(capped_cuts(setting))[-1]
    assert trace_memory(setting.with_cuts(even), profile).peak_gib < free
    assert seconds(setting.with_cuts(even)) > seconds(setting)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq1f1b_lengths": (1024, 1024)}, "sum to 2048, not to --seq-length 4096"),
        ({"seq1f1b_lengths": (4096, 0)}, "must be positive"),
        ({"seq1f1b_lengths": (2048, 2048), "seq1f1b_splits": 4}, "2 lengths for 4 splits"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        resolve(MODEL | {"seq1f1b_splits": None} | changes)
