"""The published memory tables, under the runtime of their time."""

import statistics

import pytest

from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.memory import MemoryTrace, estimate_stages, trace_memory
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime
from tests.planner.published import LIMIT_GIB, MEAN, ODD, PEAK, SCHEDULES, options_of

pytestmark = pytest.mark.long

Cell = tuple[str, int, str]


@pytest.fixture(scope="module")
def traced() -> dict[Cell, MemoryTrace]:
    profile = runtime("megatron-2023")
    return {
        (model, length, name): trace_memory(
            resolve(options_of(model, length), schedule=ScheduleName(name)), profile
        )
        for model, length in PEAK
        for name in SCHEDULES
    }


def measured(table: dict[tuple[str, int], tuple[float | None, ...]]) -> dict[Cell, float | None]:
    """Return the cells of a table, without the odd one."""
    return {
        (model, length, name): value
        for (model, length), row in table.items()
        for name, value in zip(SCHEDULES, row, strict=True)
        if (model, length, name) not in ODD
    }


def test_what_ran_out_of_memory_does_so_here(traced):
    cells = measured(PEAK)
    wrong = [
        cell for cell, value in cells.items() if (traced[cell].peak_gib > LIMIT_GIB) == bool(value)
    ]
    assert len(cells) == 47
    assert len(wrong) <= 1


def test_peak_of_the_fullest_stage(traced):
    errors = [traced[cell].peak_gib / value - 1 for cell, value in measured(PEAK).items() if value]
    assert len(errors) == 36
    assert statistics.fmean(map(abs, errors)) <= 0.05
    assert sum(abs(error) <= 0.1 for error in errors) >= 34


def test_what_sub_sequences_save(traced):
    errors = []
    for (model, length), row in PEAK.items():
        plain = row[0]
        if plain is None or (model, length, SCHEDULES[0]) in ODD:
            continue
        for name, value in zip(SCHEDULES[2:], row[2:], strict=True):
            assert value is not None
            ratio = traced[model, length, name].peak_gib / traced[model, length, "1f1b"].peak_gib
            errors.append(ratio / (value / plain) - 1)
    assert len(errors) == 14
    assert sum(abs(error) <= 0.06 for error in errors) >= 13


def test_mean_over_stages_which_nothing_was_chosen_by(traced):
    errors = [traced[cell].mean_gib / value - 1 for cell, value in measured(MEAN).items() if value]
    assert len(errors) == 19
    assert statistics.fmean(map(abs, errors)) <= 0.06
    assert sum(abs(error) <= 0.1 for error in errors) >= 17


def test_the_closed_form_prunes_the_same_settings():
    profile = runtime("megatron-2023")
    wrong = 0
    for (model, length, name), value in measured(PEAK).items():
        setting = resolve(options_of(model, length), schedule=ScheduleName(name))
        wrong += (max(estimate_stages(setting, profile)) > LIMIT_GIB) == bool(value)
    assert wrong <= 1


def test_30b_at_64k_fits_on_sub_sequences_alone():
    options, profile = options_of("30B", 65536), runtime("current")
    plain = trace_memory(resolve(options), profile)
    cut = trace_memory(resolve(options | {"seq1f1b_splits": 4}), profile)
    assert plain.peak_gib > LIMIT_GIB
    assert cut.peak_gib < LIMIT_GIB - 20


def test_splits_without_a_pipeline_cost_memory():
    options = options_of("13B", 65536, 8) | {"pipeline_model_parallel_size": 1}
    profile = runtime("current")
    whole, cut = (
        trace_memory(resolve(options | {"seq1f1b_splits": splits}), profile) for splits in (1, 4)
    )
    assert cut.peak_gib > whole.peak_gib
