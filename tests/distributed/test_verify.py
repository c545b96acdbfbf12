"""--seq1f1b-verify compares a micro-batch in sub-sequences with Megatron's own loop."""

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.families import LLAMA, RMS_NORM
from tests.distributed.megatron_model import Case
from tests.distributed.put_back import PUT_BACK
from tests.distributed.situations import Situation, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

_CASE = Case(2, 3, 3)
CASES = {
    "GPT": _CASE,
    "virtual stages": replace(_CASE, num_chunks=2, num_micro_batches=4),
    "packed documents": replace(_CASE, documents="position_ids"),
    "experts, distributed optimizer": replace(
        _CASE,
        config=LLAMA,
        spec=RMS_NORM,
        experts="aux_loss",
        ddp={"use_distributed_optimizer": True},
    ),
}


def gradients(case: Case, verify: bool, fault: str | None = None) -> Any:
    """Train two steps, of which the first is verified or not; return all gradients of this rank."""
    from contextlib import nullcontext
    from unittest.mock import patch

    from megatron.adaptor import install

    install()
    from tests.distributed import situations

    settings = situations.settings_of(case)
    verifying = replace(settings, verify=verify)
    with (
        patch.object(situations, "settings_of", lambda case: verifying),
        PUT_BACK[fault]() if fault else nullcontext(),
    ):
        session = install()
        session.loop._is_verified = False
        return run(Situation(case, loss="mean")).gradients


@pytest.mark.parametrize("name", CASES)
def test_a_verified_run_goes_on_as_if_it_had_not_been(workers, name):
    plain = workers(2).run(gradients, CASES[name], False)
    verified = workers(2).run(gradients, CASES[name], True)
    for of_rank, expected_of_rank in zip(verified, plain, strict=True):
        for found, expected in zip(of_rank, expected_of_rank, strict=True):
            for key, gradient in expected.items():
                assert (found[key] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), key


@pytest.mark.parametrize("documents", [None, "tokens"])
def test_what_differs_is_refused(workers, documents):
    case = replace(_CASE, num_stages=1, layers=2, documents=documents)
    with pytest.raises(AssertionError, match="sub-sequences do not give what one split gives"):
        workers(1).run(gradients, case, True, "losses_by_sub_sequence")
