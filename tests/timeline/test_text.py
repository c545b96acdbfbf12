"""Schedules as text."""

from hypothesis import given, settings

from seq1f1b.schedule import interleaved, one_f_one_b
from seq1f1b.timeline import text_grid
from tests.schedule.shapes import schedules
from tests.timeline.drawn import planned, with_copies


def test_a_schedule_reads_from_left_to_right():
    assert text_grid(planned(one_f_one_b(2, 2, 2))) == (
        "seq1f1b: step 7.5, bubble ratio 20.0%\n"
        "stage 0 |F0.0|F0.1|F1.0|·········|B0.1     |F1.1|B0.0     |····|B1.1     |B1.0     "
        "| idle 20.0%\n"
        "stage 1 ·····|F0.0|F0.1|B0.1     |F1.0|B0.0     |F1.1|B1.1     |B1.0     |·········"
        "| idle 20.0%\n"
    )


def test_whole_micro_batches_need_no_sub_sequence_and_chunks_stand_in_front():
    assert "|F0|F1|" in text_grid(planned(one_f_one_b(2, 4)))
    assert "|0F0|0F1|1F0|1F1|" in text_grid(planned(interleaved(2, 2, 2)))


@settings(max_examples=25)
@given(schedules(largest=5))
def test_without_a_width_every_label_is_there(schedule):
    timeline = planned(schedule)
    rows = text_grid(timeline).splitlines()[1:]
    for spans, row in zip(timeline.stages, rows, strict=True):
        for span in spans:
            assert f"{span.action.kind}{timeline.label(span.action)}" in row


def test_a_width_is_kept():
    rows = text_grid(planned(one_f_one_b(4, 8, 4)), width=60).splitlines()[1:]
    assert {row.rindex("| idle") - len("stage 0 ") for row in rows} == {60}


def test_times_carry_their_unit():
    assert "step 6 s," in text_grid(planned(one_f_one_b(1, 2), seconds=True))


def test_copies_stand_below_their_stage():
    lines = text_grid(with_copies(), width=120).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["stage", "in", "out"] * 2
    assert {line.rindex("| ") for line in lines[1:]} == {len("stage 0 ") + 120}
    # chunk 0, then 1, which stays, and 0 again
    loads = lines[2]
    assert loads.index("|0") < loads.index("|1") < loads.rindex("|0")
    gradients = lines[3]
    assert gradients.index("|1") < gradients.index("|0")
