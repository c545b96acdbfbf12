"""Copies at a link's pace: how long they take, in which order, and who shares a link."""

import threading
import time

import pytest

from megatron.adaptor.offload.link import Direction, DirectLink, PacedLink, link_of


def test_a_copy_takes_its_bytes_over_the_pace_beside_the_caller():
    link, done = PacedLink(1e6), []
    start = time.perf_counter()
    first = link.start(Direction.IN, 60_000, lambda: done.append("first"))
    second = link.start(Direction.IN, 40_000, lambda: done.append("second"))
    back = link.start(Direction.OUT, 50_000, lambda: done.append("back"))
    assert "second" not in done
    back.synchronize()
    assert time.perf_counter() - start >= 0.05
    first.order()
    assert time.perf_counter() - start >= 0.06
    second.order()
    assert time.perf_counter() - start >= 0.1
    assert sorted(done) == ["back", "first", "second"]
    assert done.index("first") < done.index("second")


def test_a_copy_waits_for_those_before_it():
    link, done = PacedLink(1e6), []
    out = link.start(Direction.OUT, 50_000, lambda: done.append("out"))
    link.start(Direction.IN, 1, lambda: done.append("into"), [out]).order()
    assert done == ["out", "into"]


def test_a_link_is_finished_when_no_copy_is_under_way():
    def broken() -> None:
        raise OSError("no such memory")

    link, done = PacedLink(1e6), []
    link.start(Direction.OUT, 50_000, lambda: done.append("out"))
    link.start(Direction.IN, 1, broken)
    link.start(Direction.IN, 30_000, lambda: done.append("in"))
    link.finish()
    assert sorted(done) == ["in", "out"]


@pytest.mark.parametrize("wait", ["order", "synchronize"])
@pytest.mark.parametrize("link", [DirectLink(), PacedLink(1e12)])
def test_what_a_copy_raises_comes_out_where_it_is_waited_for(link, wait):
    def broken() -> None:
        raise OSError("no such memory")

    with pytest.raises(OSError, match="no such memory"):
        getattr(link.start(Direction.IN, 1, broken), wait)()


def test_without_a_pace_a_copy_is_made_at_once():
    link, threads = link_of(None, None, 0), []
    link.start(Direction.IN, 10**12, lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


def order_of(one: PacedLink, other: PacedLink, num_bytes: int) -> list[tuple[float, str]]:
    """Ask each for three copies, the first a little earlier; return when each copy began."""
    begun: list[tuple[float, str]] = []
    copies = []
    for name, link in (("one", one), ("other", other)):
        copies += [
            link.start(
                Direction.IN, num_bytes, lambda name=name: begun.append((time.monotonic(), name))
            )
            for _ in range(3)
        ]
        time.sleep(0.01)
    for copied in copies:
        copied.synchronize()
    return begun


def test_ranks_under_one_root_take_turns():
    # a root that no other process on this machine is likely to use
    begun = order_of(PacedLink(1e6, 910_017), PacedLink(1e6, 910_017), 40_000)
    assert [name for _, name in begun] == ["one", "other"] * 3
    # Five copies of 40 ms come before the last; the first may have been noted late.
    assert begun[-1][0] - begun[0][0] > 0.15


def test_links_of_different_roots_do_not_wait_for_each_other():
    begun = order_of(PacedLink(1e6, 910_018), PacedLink(1e6, 910_019), 100_000)
    first = {name: min(at for at, other in begun if other == name) for _, name in begun}
    assert abs(first["one"] - first["other"]) < 0.1
