"""The way in for training loops that never see Megatron's command line."""

import atexit
import logging
import os
import sys
from collections.abc import Sequence

from megatron.adaptor.install import session_of_core

logger = logging.getLogger(__name__)


def enable(
    splits: int = 4,
    *,
    balance_method: str = "uniform_comp",
    schedule: str = "auto",
    attention: str | None = None,
    lengths: Sequence[int] | None = None,
    multiple: int = 1,
    max_live: int | None = None,
    documents: str | None = None,
    verify: bool = False,
    recompute_loss: bool = False,
    timeout_minutes: float = 10,
) -> None:
    """Run Megatron-Core's pipeline steps of this process on sub-sequences.

    For loops that call ``get_forward_backward_func`` themselves. Megatron may have been imported,
    and that name bound by any module; the function it returns must be fetched afterwards. With
    transformer-engine, call it before the model's TransformerConfig is made. Everything else is
    read from the configuration of the model and from the process groups of each step. All ranks
    must call, with the same arguments. A later call changes the settings from the next step on.

    A forward step whose batch goes through ``get_batch_on_this_cp_rank`` has it cut there. One that
    calls nothing of the kind gets cut batches from its data iterator, which must then deliver
    dictionaries of tensors. Its loss function gets the outputs of whole micro-batches in either
    case.

    splits: sub-sequences of each micro-batch; 1 is Megatron's own loop. balance_method, schedule,
    attention, lengths, multiple, max_live, verify, recompute_loss: as the flags ``--seq1f1b-...``.
    documents: the entry of a batch that tells packed documents apart, "cu_seqlens" or
    "position_ids"; None if each sequence is one. timeout_minutes: how long a stage waits for
    another.

    Raises ValueError for values that are never possible; what does not fit the model is raised by
    the first step. A process that ends without any step having run exits with status 1.
    """
    session = session_of_core()
    from megatron.adaptor.request import Request

    request = Request(
        splits=splits,
        balance_method=balance_method,
        schedule=schedule,
        attention=attention,
        lengths=None if lengths is None else tuple(lengths),
        multiple=multiple,
        max_live=max_live,
        documents=documents,
        verify=verify,
        recompute_loss=recompute_loss,
        timeout_minutes=timeout_minutes,
    )
    if session.args is not None:
        raise RuntimeError(
            "Megatron's command line has brought settings already: use either enable() or the flags"
        )
    if session.request is None:
        atexit.register(_check_was_used, os.getpid())
    session.request = request


def _check_was_used(process: int) -> None:
    """End with an error if no step has read the settings; one that failed before has its own."""
    failed = getattr(sys, "last_exc", None) is not None
    if session_of_core().has_stepped or failed or os.getpid() != process:
        return
    logger.error(
        "megatron.adaptor.enable() was called, and no step has read its settings: call "
        "get_forward_backward_func of megatron.core after it, in the same process, and run what it "
        "returns"
    )
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # What runs at exit can change the status in no other way.
    os._exit(1)
