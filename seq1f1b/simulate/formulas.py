"""What theory allows, in closed form, for stages and sub-sequences of equal cost."""


def bubble_ratio(
    num_stages: int, num_chunks: int, num_micro_batches: int, num_splits: int
) -> float:
    """Return the idle share of a stage's step under 1F1B, interleaved or on sub-sequences.

    The bubble is (p - 1)(F + B) / (v s) long, the work m (F + B) (arXiv 2104.04473, section 2.2;
    arXiv 2406.03488, section 3.4).
    """
    bubble = (num_stages - 1) / (num_chunks * num_splits)
    return bubble / (bubble + num_micro_batches)


def speedup_over_1f1b(
    num_stages: int, num_chunks: int, num_micro_batches: int, num_splits: int
) -> float:
    """Return the ratio of 1F1B's step time to this schedule's."""
    plain = bubble_ratio(num_stages, 1, num_micro_batches, 1)
    return (1 - bubble_ratio(num_stages, num_chunks, num_micro_batches, num_splits)) / (1 - plain)


def live_micro_batches(
    num_stages: int, num_micro_batches: int, num_splits: int, stage: int = 0
) -> float:
    """Return how many micro-batches' activations a stage of (Seq)1F1B holds, KV carry apart.

    min(s + p - 1 - i, m s) sub-sequences of 1 / s micro-batch each (arXiv 2406.03488, section 3.2).
    """
    live = min(num_splits + num_stages - 1 - stage, num_micro_batches * num_splits)
    return live / num_splits
