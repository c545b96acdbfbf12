"""Any script gets the numbers of one split, or a refusal before the first update."""

from dataclasses import replace

import pytest

from tests.distributed.families import LATENT, LATENT_SPEC, LLAMA, RMS_NORM
from tests.distributed.megatron_model import Case
from tests.distributed.situations import (
    BATCHES,
    CHANGES,
    LOSSES,
    Situation,
    outcomes,
)
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

# No multiple of the splits, and micro-batches of two sequences.
_CASE = Case(2, 3, 3)
_EXPERTS = replace(_CASE, config=LLAMA, spec=RMS_NORM, experts="aux_loss")
TOLERANCE = 1e-5

UNEVEN = ("mean, unclamped", "sum, count and means", "of sequences", "worst tokens", "narrowed")
EVERYWHERE = {
    "virtual stages": replace(_CASE, num_chunks=2, num_micro_batches=4),
    "zb-h1": replace(_CASE, kind="zb-h1"),
    "greedy": replace(_CASE, kind="greedy"),
    "multi-token prediction": replace(_CASE, config=LLAMA | {"mtp_num_layers": 2}, spec=RMS_NORM),
    "latent attention": replace(_CASE, config=LATENT, spec=LATENT_SPEC),
    "recomputed": replace(_CASE, recompute=True),
    "recomputed loss": replace(_CASE, recompute_loss=True),
    "normalised by the step's tokens": replace(_CASE, per_token=True),
}


def check(workers, situations: list[Situation]) -> None:
    """Assert that every situation equals one split on every rank."""
    size = situations[0].case.num_ranks
    by_rank = workers(size).run(outcomes, situations, timeout=300)
    for situation, *found in zip(situations, *by_rank, strict=True):
        for outcome in found:
            assert isinstance(outcome, float), (situation, outcome)
            assert outcome < TOLERANCE, (situation, outcome)


@pytest.mark.parametrize(
    "batch", mostly_long(["plain", "masked prompt", "labels of -100"], default=["masked prompt"])
)
def test_every_loss(workers, batch):
    check(workers, [Situation(_CASE, loss=loss, batch=batch) for loss in LOSSES])


@pytest.mark.parametrize(
    "name",
    mostly_long(
        EVERYWHERE, default=["virtual stages", "zb-h1", "multi-token prediction", "recomputed loss"]
    ),
)
def test_losses_under(workers, name):
    case = EVERYWHERE[name]
    situations = [Situation(case, loss=loss, batch="masked prompt") for loss in UNEVEN]
    check(workers, [*situations, Situation(case, loss="squared", evaluates=True)])


def test_losses_under_tensor_parallelism(workers):
    case = replace(_CASE, tensor=2, sequence_parallel=True, config=LLAMA, spec=RMS_NORM)
    check(workers, [Situation(case, loss=loss, batch="masked prompt") for loss in UNEVEN])


def test_losses_under_context_parallelism(workers):
    """Each rank has its own tokens: any function of the tokens that it has with one split."""
    case = replace(_CASE, context=2, length=32)
    losses = ("squared", "worst tokens", "narrowed", "of sequences", "mean", "of logits")
    situations = [Situation(case, loss=loss, batch="every token counts") for loss in losses]
    situations += [
        Situation(replace(case, per_token=True), batch="masked prompt"),
        Situation(case, batch="every token counts"),
    ]
    check(workers, situations)


@pytest.mark.long
def test_evaluation(workers):
    check(workers, [Situation(_CASE, loss=loss, evaluates=True) for loss in LOSSES])


def test_batches(workers):
    positions = replace(_CASE, positions="mrope", config={"mrope_section": [1, 1, 0]})
    situations = [Situation(_CASE, batch=batch) for batch in ("causal mask", "every token counts")]
    situations += [Situation(positions, batch="positions of M-RoPE")]
    check(workers, situations)


@pytest.mark.parametrize(
    "experts",
    mostly_long(
        ["aux_loss", "seq_aux_loss", ["aux_loss", "seq_aux_loss"]], default=["seq_aux_loss"]
    ),
)
def test_experts(workers, experts):
    """Padding does not count, even where a sub-sequence holds nothing else."""
    coefficients = {"moe_aux_loss_coeff": [0.5, 0.3]} if isinstance(experts, list) else {}
    case = replace(_EXPERTS, experts=experts, config=LLAMA | coefficients)
    cases = [case, replace(case, per_token=True), replace(case, recompute=True, num_splits=5)]
    situations = [Situation(c, batch=b) for c in cases for b in ("plain", "padding mask")]
    check(workers, situations)


@pytest.mark.parametrize("of", ["balance", "z_loss"])
def test_a_router_that_is_called_twice_is_refused(workers, of):
    """A second call in a forward would take the place of the first in the losses."""
    coefficients = {"moe_z_loss_coeff": None} if of == "balance" else {"moe_aux_loss_coeff": 0.0}
    config = LLAMA | {"mlp_chunks_for_training": 2} | coefficients
    case = replace(_EXPERTS, num_stages=1, layers=2, config=config)
    cases = [case, replace(case, recompute=True)]
    (found,) = workers(1).run(outcomes, [Situation(c) for c in cases], timeout=300)
    for outcome in found:
        assert "a router is called several times in the forward of a sub-sequence" in str(outcome)


def test_masks_of_packed_documents_that_run_whole(workers):
    """Their mask may come along with them, and no other."""
    case = replace(_CASE, num_stages=1, layers=2, documents="tokens", num_splits=1)
    situations = [Situation(case), Situation(case, batch="causal mask")]
    (found,) = workers(1).run(outcomes, situations, timeout=300)
    assert found[0] == 0.0
    assert "is not causal within each document; packed documents attend causally only" in found[1]


def test_changes_that_repeat(workers):
    check(workers, [Situation(_CASE, change=change) for change in ("nothing", "scaled mask")])


REFUSED = {
    ("change", "rolled labels"): "'labels' of the model's inputs differs",
    ("change", "own positions"): "'position_ids' of the model's inputs differs",
    ("change", "random mask"): "the forward step draws random numbers",
    ("change", "kept state"): "the loss of a micro-batch differs when the forward step",
    ("batch", "prefix mask"): "attention mask of shape [1, 1, 30, 30] that is not causal",
}


def test_every_batch_and_change_is_exact_or_refused(workers):
    """On one stage, where no other rank waits; a refused step leaves nothing behind."""
    case = replace(_CASE, num_stages=1, layers=2)
    situations = [Situation(case, change=change) for change in CHANGES]
    situations += [
        Situation(case, batch=batch) for batch in BATCHES if batch != "positions of M-RoPE"
    ]
    situations += [Situation(replace(case, recompute_loss=True), loss="of logits")]
    (found,) = workers(1).run(outcomes, situations, timeout=300)
    for situation, outcome in zip(situations, found, strict=True):
        why = REFUSED.get(("change", situation.change)) or REFUSED.get(("batch", situation.batch))
        if situation.case.recompute_loss:
            why = "--seq1f1b-recompute-loss: the script's loss is computed from logits"
        if why is None:
            assert isinstance(outcome, float), (situation, outcome)
            assert outcome < TOLERANCE, situation
        else:
            assert why in str(outcome), situation
