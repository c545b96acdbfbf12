"""Faults put into the code, one at a time, each of which the default tests must find.

    python -m tests.mutants            # all of them, in copies of the checkout

A mutant is a text that occurs once in a file, what it becomes, and the tests that fail then.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_COPIED = ("seq1f1b", "megatron", "tests", "pyproject.toml", "pretrain_gpt.py", "docs")


@dataclass(frozen=True)
class Mutant:
    """One fault; ``tests`` are arguments for pytest."""

    name: str
    file: str
    text: str
    becomes: str
    tests: str

    @property
    def is_current(self) -> bool:
        """Whether the text still occurs exactly once."""
        return (ROOT / self.file).read_text().count(self.text) == 1


_ATTENTION = "tests/attention"
_EXECUTOR = "tests/runtime/test_executor.py"
_CONTRACT = "tests/distributed/test_contract.py"
_OFFLOAD = "tests/distributed/test_offload.py -k bit_for_bit"
_ARRIVAL = "tests/distributed/test_offload.py -k arrival"
_FEATURES = "tests/distributed/test_megatron_gradients.py -k every_feature"
MUTANTS = (
    Mutant(
        "a sub-sequence does not see the one before it",
        "seq1f1b/attention/prefix_causal.py",
        "return Inputs(query, carry.keys[: part.stop], carry.values[: part.stop], scale)",
        "return Inputs(\n"
        "        query,\n"
        "        carry.keys[part.start : part.stop],\n"
        "        carry.values[part.start : part.stop],\n"
        "        scale,\n"
        "    )",
        _ATTENTION,
    ),
    Mutant(
        "gradients of a prefix are lost",
        "seq1f1b/attention/carry.py",
        "self._key_gradients[: part.start].add_(keys)",
        "pass",
        _ATTENTION,
    ),
    Mutant(
        "keys are written at another place",
        "seq1f1b/attention/carry.py",
        "self.keys[part.start : part.stop].copy_(keys.detach())",
        "self.keys[: part.length].copy_(keys.detach())",
        _ATTENTION,
    ),
    Mutant(
        "the validator does not know keys and values",
        "seq1f1b/schedule/edges.py",
        "        if sub_sequence > 0:\n",
        "        if sub_sequence > 99:\n",
        "tests/schedule",
    ),
    Mutant(
        "the validator does not know gradients of keys and values",
        "seq1f1b/schedule/edges.py",
        "if sub_sequence < schedule.num_splits - 1:",
        "if sub_sequence < 0:",
        "tests/schedule",
    ),
    Mutant(
        "one warm-up forward too few",
        "seq1f1b/schedule/generators.py",
        "num_warmup = num_splits - 1 + num_stages - stage - 1",
        "num_warmup = num_splits - 2 + num_stages - stage - 1",
        "tests/schedule",
    ),
    Mutant(
        "the carry need not be whole after a step",
        "seq1f1b/runtime/executor.py",
        "        self.context.carries.check_whole()\n",
        "",
        _EXECUTOR,
    ),
    Mutant(
        "weight gradients need not be computed",
        "seq1f1b/runtime/executor.py",
        "        self.context.weight_gradients.check_empty()\n",
        "",
        _EXECUTOR,
    ),
    Mutant(
        "tensors may be left after a step",
        "seq1f1b/runtime/executor.py",
        'assert not left, f"{name} after',
        'assert True, f"{name} after',
        _EXECUTOR,
    ),
    Mutant(
        "a failed step keeps its carry",
        "seq1f1b/runtime/context.py",
        "            self.carries.drop()\n",
        "",
        "tests/attention/test_carry.py",
    ),
    Mutant(
        "a failed step keeps its deferred work",
        "seq1f1b/runtime/context.py",
        "            self.weight_gradients.drop()\n",
        "",
        "tests/attention/test_carry.py",
    ),
    Mutant(
        "a tensor may change while it is sent",
        "seq1f1b/runtime/transport.py",
        "channel = Channel(\n            is_forward=action.kind in (Kind.SEND_F, Kind.RECV_F),",
        "channel = Channel(\n            is_forward=action.kind in (Kind.SEND_B, Kind.RECV_B),",
        "tests/distributed/test_gradients.py tests/distributed/test_megatron_gradients.py",
    ),
    Mutant(
        "rotary positions start at 0",
        "megatron/adaptor/layers/positions.py",
        "return original(embedding, max_seq_len, offset + self._context.offset, *args, **kwargs)",
        "return original(embedding, max_seq_len, offset, *args, **kwargs)",
        _FEATURES,
    ),
    Mutant(
        "a loss's gradient is not divided by the micro-batch's tokens",
        "megatron/adaptor/step/loss.py",
        "                value /= self._divisor(num_tokens)\n",
        "",
        _FEATURES,
    ),
    Mutant(
        "gradients of the loss go to the wrong sub-sequence",
        "megatron/adaptor/step/loss.py",
        "return _GradientOfLoss.apply(lambda: outputs.gradients[index], scale, *leaves)",
        "return _GradientOfLoss.apply(lambda: outputs.gradients[0], scale, *leaves)",
        _FEATURES,
    ),
    Mutant(
        "masks are dropped unread",
        "megatron/adaptor/step/batch_feed.py",
        "            check_mask(batch[_MASK], self._context.running_documents)\n",
        "            pass\n",
        f"{_CONTRACT} -k exact_or_refused",
    ),
    Mutant(
        "inputs that change after the cut are not noticed",
        "megatron/adaptor/step/step.py",
        "                self.forward_steps.check()\n",
        "",
        f"{_CONTRACT} -k exact_or_refused",
    ),
    Mutant(
        "a load does not wait for its model chunk's update",
        "megatron/adaptor/offload/slots.py",
        "        self._updates.settle(self._chunks[chunk])\n",
        "",
        _OFFLOAD,
    ),
    Mutant(
        "gradients of a parameter that comes from another device miss the buffers",
        "megatron/adaptor/offload/slots.py",
        "                self._keep_hook(chunk, parameter)\n",
        "",
        "tests/adaptor/test_offload_streams.py -k reach",
    ),
    Mutant(
        "a copy does not wait for computations that use its slot",
        "megatron/adaptor/offload/link.py",
        "        lane.wait_stream(self._cuda.current_stream())\n",
        "",
        "tests/adaptor/test_offload_streams.py -k races",
    ),
    Mutant(
        "gradients are dropped before their update",
        "megatron/adaptor/offload/updates.py",
        "return None if self._waiting else original(optimizer, *args, **kwargs)",
        "return original(optimizer, *args, **kwargs)",
        _OFFLOAD,
    ),
    Mutant(
        "gradients are zeroed before their update",
        "megatron/adaptor/offload/updates.py",
        "if any(buffer is held for waiting in self._waiting.values() for held in waiting.buffers):",
        "if False:",
        _OFFLOAD,
    ),
    Mutant(
        "an update does not wait for its gradients to arrive",
        "megatron/adaptor/offload/updates.py",
        "                self._arrived()\n",
        "",
        _ARRIVAL,
    ),
    Mutant(
        "the host does not wait for a copy",
        "megatron/adaptor/offload/link.py",
        "return Copied(partial(self._order, event), event.synchronize)",
        "return Copied(partial(self._order, event), _nothing)",
        "tests/adaptor/test_offload_streams.py -k races",
    ),
    Mutant(
        "gradients that come back to the device count as complete",
        "megatron/adaptor/offload/slots.py",
        "is_complete = self._reduces and action == self._last_frees[chunk]",
        "is_complete = True",
        "tests/adaptor/test_offload_streams.py -k races",
    ),
    Mutant(
        "gradients are dropped before the norm has read them",
        "megatron/adaptor/offload/updates.py",
        "self._num_readers = 1 if arrived is None else 2",
        "self._num_readers = 1",
        _ARRIVAL,
    ),
    Mutant(
        "gradients that were reduced on the device are reduced again at home",
        "megatron/adaptor/offload/reductions.py",
        "        if norms is None:\n",
        "        if True:\n",
        "tests/distributed/test_offload.py -k replicas",
    ),
    Mutant(
        "norms are of gradients that change after their reduction",
        "megatron/adaptor/offload/reductions.py",
        "frozenset(chunk for chunk in chunks if not changes_of(chunk))",
        "frozenset(chunks)",
        _OFFLOAD,
    ),
    Mutant(
        "tied embeddings are updated before stages have summed their gradients",
        "megatron/adaptor/offload/arrival.py",
        'has_embedding and getattr(model, "share_embeddings_and_output_weights", True)',
        "False",
        "tests/adaptor/test_offload_arrival.py",
    ),
)


def find(mutant: Mutant) -> bool:
    """Return whether the tests fail with the fault in the code, and pass without it."""
    if not _pass(mutant.tests):
        raise RuntimeError(f"{mutant.name}: pytest {mutant.tests} fails without the fault")
    return not _pass(mutant.tests, mutant)


@cache
def _pass(tests: str, mutant: Mutant | None = None) -> bool:
    """Run tests on a copy of the checkout, with a fault or without."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for entry in _COPIED:
            source = ROOT / entry
            if source.is_dir():
                shutil.copytree(source, copy / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / entry)
        if mutant is not None:
            file = copy / mutant.file
            file.write_text(file.read_text().replace(mutant.text, mutant.becomes))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "--all", "-q", "-x", *shlex.split(tests)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode not in (0, 1):
        raise RuntimeError(f"pytest {tests} did not run:\n{run.stdout[-2000:]}")
    return run.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants")
    options = parser.parse_args(arguments)
    survivors = 0
    for number, mutant in enumerate(MUTANTS):
        if options.only and number not in options.only:
            continue
        is_found = find(mutant)
        survivors += not is_found
        print(f"{number:2} {'found' if is_found else 'SURVIVES'}: {mutant.name}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
