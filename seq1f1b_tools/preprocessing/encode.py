"""Batches of texts to batches of tokens, several at a time, in order."""

import itertools
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from seq1f1b.processes import ending
from seq1f1b_tools.interrupts import leave_interrupts_to_parent
from seq1f1b_tools.preprocessing.errors import DataError
from seq1f1b_tools.preprocessing.indexed import EncodedDocuments, token_dtype
from seq1f1b_tools.preprocessing.source import Batch, Document
from seq1f1b_tools.preprocessing.tokenizer import BatchTokenizer


@dataclass(frozen=True)
class DocumentEncoder:
    """From documents to tokens.

    Attributes:
        tokenizer: for the sentences.
        eod: token to end each document with that is not empty; None to end it without one.
        split: a text to its sentences; None to take each text as one.
    """

    tokenizer: BatchTokenizer
    eod: int | None
    split: Callable[[str], list[str]] | None

    @property
    def is_threaded(self) -> bool:
        """Whether all the work is done in the tokenizer's own threads."""
        return self.tokenizer.is_threaded and self.split is None

    def __call__(self, documents: list[Document]) -> list[EncodedDocuments]:
        """Encode documents of one or more keys; gives one result for each key."""
        return [self._encode_key([*texts]) for texts in zip(*documents, strict=True)]

    def _encode_key(self, texts: list[list[str]]) -> EncodedDocuments:
        if self.split is not None:
            texts = [[part for text in document for part in self.split(text)] for document in texts]
        encoded = iter(self.tokenizer.encode(list(itertools.chain.from_iterable(texts))))
        sequences: list[list[int]] = []
        num_sequences: list[int] = []
        for document in texts:
            kept = [ids for ids in itertools.islice(encoded, len(document)) if ids]
            if kept and self.eod is not None:
                kept[-1].append(self.eod)
            sequences += kept
            num_sequences.append(len(kept))
        lengths = [len(ids) for ids in sequences]
        tokens = np.fromiter(
            itertools.chain.from_iterable(sequences),
            dtype=token_dtype(self.tokenizer.vocab_size),
            count=sum(lengths),
        )
        return EncodedDocuments(tokens, lengths, num_sequences)


_PATIENCE = 5.0
"""Seconds after which a batch that is still under way is a reason to look at the workers."""

_worker_encoder: DocumentEncoder | None = None


def _start_worker(encoder: DocumentEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    leave_interrupts_to_parent()


def _encode_in_worker(documents: list[Document]) -> list[EncodedDocuments]:
    assert _worker_encoder is not None
    return _worker_encoder(documents)


InOrder = Callable[[Iterable[Batch]], Iterator[tuple[Batch, list[EncodedDocuments]]]]
"""Takes batches and gives each with its tokens, in the batches' order."""


@contextmanager
def encoding_threads(encoder: DocumentEncoder) -> Iterator[InOrder]:
    """Encode with a tokenizer that has threads of its own.

    Two batches are under way at once: the tokenizer's threads take up the second while the first's
    last long document is still at work, and while its ids are copied.
    """
    executor = ThreadPoolExecutor(2)
    try:
        yield partial(_in_order, executor, encoder, 3, ())
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def encoding_processes(encoder: DocumentEncoder, num_workers: int) -> Iterator[InOrder]:
    """Encode with work done in Python, in `num_workers` processes.

    To be entered before the process has threads, which a fork would lose.

    Raises:
        DataError: a worker died.
    """
    # forked workers have the loaded tokenizer at once, where others would import Megatron again
    executor = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    workers: list[Any] = []
    try:
        executor.submit(int).result()
        workers = multiprocessing.active_children()
        yield partial(_in_order, executor, _encode_in_worker, 2 * num_workers + 1, workers)
        executor.shutdown()
    except BrokenProcessPool as error:
        raise DataError(_why_broken(workers)) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()


def _in_order(
    executor: Executor,
    encode: Callable[[list[Document]], list[EncodedDocuments]],
    depth: int,
    workers: Sequence[Any],
    batches: Iterable[Batch],
) -> Iterator[tuple[Batch, list[EncodedDocuments]]]:
    pending: deque[tuple[Batch, Future[list[EncodedDocuments]]]] = deque()
    for batch in batches:
        pending.append((batch, executor.submit(encode, batch.documents)))
        if len(pending) >= depth:
            yield _result(*pending.popleft(), workers)
    while pending:
        yield _result(*pending.popleft(), workers)


def _result(
    batch: Batch, future: Future[list[EncodedDocuments]], workers: Sequence[Any]
) -> tuple[Batch, list[EncodedDocuments]]:
    while not wait([future], _PATIENCE).done:
        # The executor hears nothing of a worker that was killed in the middle of an answer.
        if not all(worker.is_alive() for worker in workers):
            raise BrokenProcessPool
    try:
        return batch, future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:  # whatever the tokenizer raises on a text it cannot take
        raise DataError(
            f"a document between {batch.first_line} and {batch.last_line} cannot be tokenized: "
            f"{type(error).__name__}: {error}"
        ) from error


def _why_broken(workers: list[Any]) -> str:
    for worker in workers:
        worker.join(timeout=5)
    # a thread of the executor may have taken a status from the system and not noted it yet
    end = time.monotonic() + 1
    while None in [worker.exitcode for worker in workers] and time.monotonic() < end:
        time.sleep(0.01)
    # the executor ends the others with SIGTERM: another way of ending is the first one's
    codes = {worker.exitcode for worker in workers} - {None, 0, -signal.SIGTERM}
    return (
        f"a worker process ended unexpectedly {' and '.join(map(ending, sorted(codes)))}".rstrip()
        + ". Out of memory? Then use fewer --workers or a smaller --chunk-size"
    )
