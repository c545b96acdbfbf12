"""The order in which contenders are measured, so that each is the first of a round in its turn."""

from collections.abc import Iterator, Sequence


def in_turn[T](contenders: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield the round's number with every contender once a round: A B C, then B C A, ..."""
    for number in range(rounds):
        first = number % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            yield number, contender
