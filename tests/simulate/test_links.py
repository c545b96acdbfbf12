"""Links that copies share, and work that waits for its turn, by hand."""

import pytest

from seq1f1b.simulate.links import Clock, Lane, Queue, Turns, Uplink


def test_copies_of_gpus_under_a_root_share_its_link():
    clock, ends = Clock(), {}
    uplink = Uplink(clock, bandwidth=10.0, lane=8.0)
    lanes = [Lane(uplink), Lane(uplink)]
    lanes[0].copy(40.0, lambda _: ends.setdefault("first", clock.now))
    lanes[0].copy(8.0, lambda _: ends.setdefault("behind it", clock.now))
    clock.at(1.0, lambda: lanes[1].copy(10.0, lambda _: ends.setdefault("beside", clock.now)))
    clock.run()
    # alone 8 a second for a second; 5 each for 2 seconds; then alone again: 22 left at 8
    assert ends["beside"] == pytest.approx(3.0)
    assert ends["first"] == pytest.approx(3.0 + 22 / 8)
    assert ends["behind it"] == pytest.approx(3.0 + 22 / 8 + 1)


def test_one_worker_does_one_thing_at_a_time():
    clock, ends = Clock(), []
    queue = Queue(clock)
    queue.work(2.0, lambda: ends.append(clock.now))
    queue.work(1.0, lambda: ends.append(clock.now))
    clock.at(5.0, lambda: queue.work(1.0, lambda: ends.append(clock.now)))
    clock.run()
    assert ends == [2.0, 3.0, 6.0]


def test_on_a_link_of_turns_each_copy_has_all_of_it():
    clock, spans = Clock(), {}
    turns = Turns(clock, bandwidth=10.0)
    lanes = [Lane(turns), Lane(turns)]
    lanes[0].copy(40.0, lambda start: spans.setdefault("first", (start, clock.now)))
    lanes[0].copy(10.0, lambda start: spans.setdefault("behind it", (start, clock.now)))
    clock.at(
        1.0, lambda: lanes[1].copy(20.0, lambda at: spans.setdefault("beside", (at, clock.now)))
    )
    clock.run()
    assert spans == {"first": (0.0, 4.0), "beside": (4.0, 6.0), "behind it": (6.0, 7.0)}


def test_a_copy_that_cannot_begin_holds_up_those_behind_it():
    clock, ends, free = Clock(), [], set()
    lane = Lane(Turns(clock, bandwidth=1.0))
    lane.copy(1.0, lambda _: ends.append(("first", clock.now)), lambda: "slot" in free)
    lane.copy(1.0, lambda _: ends.append(("second", clock.now)))
    clock.at(2.0, lambda: free.add("slot"))
    clock.at(3.0, lane.go_on)
    clock.run()
    assert ends == [("first", 4.0), ("second", 5.0)]
