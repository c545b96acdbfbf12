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


def step_time(
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    num_splits: int,
    *,
    forward: float = 1.0,
    backward: float = 2.0,
) -> float:
    """Return the length of a step; ``forward`` and ``backward`` of a stage and micro-batch."""
    bubble = (num_stages - 1) / (num_chunks * num_splits)
    return (bubble + num_micro_batches) * (forward + backward)


def zb_h1_bubble(
    num_stages: int,
    num_splits: int,
    *,
    forward: float = 1.0,
    input_gradient: float = 1.0,
    weight_gradient: float = 1.0,
) -> float:
    """Return how long a stage idles under (Seq1F1B) ZB-H1, where ``zb_h1_applies``.

    (p - 1)(F + I - W) / s, of the times of a stage and micro-batch (arXiv 2401.10241, section 2.3).
    That supposes that W is no longer than F and I; a longer one cannot shorten the wait of the last
    stage for its first forward, (p - 1) F / s, nor the first stage's for its first gradient,
    (p - 1) I / s.
    """
    wait = max(forward, input_gradient, forward + input_gradient - weight_gradient)
    return (num_stages - 1) * wait / num_splits


def zb_h1_applies(num_stages: int, num_micro_batches: int, num_splits: int) -> bool:
    """Tell whether a step has the p + s - 1 sub-sequences that ZB-H1 fills its waits with."""
    return num_micro_batches * num_splits >= num_stages + num_splits - 1


def zb_h1_bubble_ratio(
    num_stages: int,
    num_micro_batches: int,
    num_splits: int,
    *,
    forward: float = 1.0,
    input_gradient: float = 1.0,
    weight_gradient: float = 1.0,
) -> float:
    """Return the idle share of a stage's step under (Seq1F1B) ZB-H1."""
    bubble = zb_h1_bubble(
        num_stages,
        num_splits,
        forward=forward,
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
    )
    return bubble / (bubble + num_micro_batches * (forward + input_gradient + weight_gradient))


def live_micro_batches(
    num_stages: int,
    num_micro_batches: int,
    num_splits: int,
    stage: int = 0,
    *,
    num_chunks: int = 1,
) -> float:
    """Return how many micro-batches' activations a stage holds, without the KV carry.

    Under (Seq)1F1B min(p - i + s - 1, m s) sub-sequences of 1 / s micro-batch each (arXiv
    2406.03488, section 3.2). Interleaved, min((v - 1) p + 2 (p - i - 1) + s, m v s) of 1 / (v s)
    each, where s divides p; with one split that is p (1 + (p - 1) / (p v)) on the first stage
    (arXiv 2205.05198, section 4.2.3).
    """
    behind = num_stages - stage - 1
    if num_chunks == 1:
        live = behind + num_splits
    else:
        live = (num_chunks - 1) * num_stages + 2 * behind + num_splits
    parts = num_chunks * num_splits
    return min(live, num_micro_batches * parts) / parts
