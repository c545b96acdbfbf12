"""What the schedule tests draw from: every size up to 8 stages, 4 chunks, 16 x 8 parts."""

from collections.abc import Callable

from hypothesis import strategies as st

from seq1f1b.schedule import Schedule, forward_only, gpipe, interleaved, one_f_one_b, zb_h1
from seq1f1b.simulate import Costs, greedy


def _interleaved(stages: int, chunks: int, micro_batches: int, splits: int) -> Schedule:
    return interleaved(stages, 1 if stages == 1 else chunks, micro_batches, splits)


def _greedy(stages: int, chunks: int, micro_batches: int, splits: int) -> Schedule:
    """Search with later sub-sequences that take longer."""
    like = _interleaved(stages, chunks, micro_batches, splits)
    costs = Costs.of_forwards(like, [1 + 0.25 * j for j in range(splits)], backward_ratio=2.0)
    return greedy(stages, like.num_chunks, micro_batches, splits, costs)


GENERATORS: dict[str, Callable[[int, int, int, int], Schedule]] = {
    "gpipe": lambda p, v, m, s: gpipe(p, m, s),
    "one_f_one_b": lambda p, v, m, s: one_f_one_b(p, m, s),
    "interleaved": _interleaved,
    "zb_h1": lambda p, v, m, s: zb_h1(p, m, s),
    "greedy": _greedy,
    "forward_only": forward_only,
}

STAGES = st.integers(1, 8)
CHUNKS = st.integers(1, 4)
MICRO_BATCHES = st.integers(1, 16)
SPLITS = st.integers(1, 8)


@st.composite
def schedules(
    draw: st.DrawFn, trains: bool = False, largest: int = 16, whole: bool = False
) -> Schedule:
    """Draw a schedule of computations from any generator, of no size above ``largest``.

    ``trains`` leaves out those without backwards, ``whole`` those that split them.
    """
    left_out = ({"forward_only"} if trains else set()) | ({"zb_h1", "greedy"} if whole else set())
    names = sorted(GENERATORS.keys() - left_out)
    make = GENERATORS[draw(st.sampled_from(names))]
    sizes = [min(draw(size), largest) for size in (STAGES, CHUNKS, MICRO_BATCHES, SPLITS)]
    return make(*sizes)
