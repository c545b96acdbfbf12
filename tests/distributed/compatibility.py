"""docs/compatibility.md, made of what the matrix tests saw."""

from collections.abc import Mapping
from itertools import combinations

from tests.distributed.matrix import MATRIX, NUM_MICRO_BATCHES, Row
from tests.distributed.megatron_model import BATCH

Pair = tuple[str, str, str, str]
"""Key and name of one choice, key and name of another."""

_HEAD = """# Compatibility

Made by `tests/distributed/test_matrix.py` from what it saw; a test fails when this page and the
outcome differ. **yes**: gradients of every parameter, losses and reports of at least one training
step with both choices equal those of the whole model on one process, to 1e-5 in float32. A number
in brackets: the command line refuses the pair before any process group is made, with the message
at the end of this page.

{steps} steps of {micro_batches} micro-batches with {batch} sequences each cover {pairs} pairs of
choices, of which {refused} are refused. DeepSeek (multi-latent attention and experts)
under tensor parallelism is compared with Megatron's own schedule on the same ranks, because
Megatron's own layers do not reduce the gradients of its norms as one process would.
"""


def page(refusals: Mapping[Pair, str | None], seen: Mapping[Row, float]) -> str:
    """Return the page for the ``refusals`` of all pairs and the rows ``seen`` to work."""
    messages = list(dict.fromkeys(why for why in refusals.values() if why is not None))
    works = {
        (a, one, b, other)
        for row in seen
        for (a, one), (b, other) in combinations(zip(MATRIX, row, strict=True), 2)
    }

    def cell(pair: Pair) -> str:
        why = refusals[pair]
        if why is not None:
            return f"[{messages.index(why) + 1}]"
        return "yes" if pair in works else "not run"

    head = _HEAD.format(
        steps=len(seen),
        micro_batches=NUM_MICRO_BATCHES,
        batch=BATCH,
        pairs=len(refusals),
        refused=sum(why is not None for why in refusals.values()),
    )
    tables = []
    for down, across in combinations(MATRIX, 2):
        header = [f"{down} / {across}", *MATRIX[across]]
        lines = [header, ["---"] * len(header)]
        for one in MATRIX[down]:
            lines.append([one, *(cell((down, one, across, other)) for other in MATRIX[across])])
        tables.append("".join("| " + " | ".join(line) + " |\n" for line in lines))
    listing = "".join(f"{number}. {why}\n" for number, why in enumerate(messages, 1))
    return "\n".join([head, *tables, "## Refusals\n", listing])
