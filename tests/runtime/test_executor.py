"""The executor on its own: errors, leaks and the clock."""

import time

import pytest
import torch

from seq1f1b.runtime import ActionClock, ActionError, ExecutionContext, execute
from seq1f1b.schedule import Action, Kind, forward_only, lower, one_f_one_b, visiting
from seq1f1b.sequence import sub_sequences
from tests.tiny_model import ModelPart, TinyComputation, micro_batches

LENGTHS = (5, 4, 3)


class NoLink:
    """A single stage sends and receives nothing."""

    def receive(self, action):
        raise AssertionError(action)

    def send(self, action, tensor):
        raise AssertionError(action)

    def finish(self):
        pass


class SlowVisits:
    """A chunk takes a while to come; notes what it is asked for."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.asked = []

    def load(self, action):
        self.asked.append(str(action))

    def wait(self, action):
        self.asked.append(f"wait {action}")
        time.sleep(self.seconds)

    def free(self, action):
        self.asked.append(str(action))


def run(schedule, *, fail_at=None, forget=None, visits=None):
    data = micro_batches(schedule.num_micro_batches, sum(LENGTHS))
    parts = [sub_sequences(LENGTHS)] * len(data)
    context = ExecutionContext()
    computation = TinyComputation([ModelPart(0, 1, sum(LENGTHS), context)], data, parts, context)
    clock = ActionClock()
    if fail_at:
        method = "forward" if fail_at.kind is Kind.F else "backward"
        original = getattr(computation, method)

        def failing(action, *rest):
            if action == fail_at:
                raise RuntimeError("no such luck")
            return original(action, *rest)

        setattr(computation, method, failing)
    actions = [action for action in lower(schedule).stages[0] if action != forget]
    execute(actions, computation, NoLink(), context, parts, clock, stage=0, visits=visits)
    return context, clock


@pytest.mark.parametrize("text", ["0F1.2", "0B0.1"])
def test_an_error_names_stage_step_and_action(text):
    action = Action.parse(text)
    schedule = one_f_one_b(1, 2, 3)
    step = schedule.stages[0].index(action)
    with pytest.raises(ActionError, match=rf"stage 0, step {step} of 12, action {text}: no such"):
        run(schedule, fail_at=action)


def test_a_chunk_is_waited_for_before_it_computes_and_waiting_is_no_computing():
    visits = SlowVisits(0.05)
    schedule = visiting(lower(one_f_one_b(1, 1, 3)), 1)
    _, clock = run(schedule, visits=visits)
    spans, length = clock.finish()
    computed = [f"wait {span.action}" for span in spans]
    assert visits.asked == ["0LOAD_F0.0", *computed, "0FREE_B0.0"]
    assert length - sum(span.end - span.start for span in spans) >= 6 * 0.05


def test_a_backward_left_out_leaks_and_is_noticed():
    with pytest.raises(AssertionError, match=r"alive after the step: 0F1\.0"):
        run(one_f_one_b(1, 2, 3), forget=Action.parse("0B1.0"))


def split_backwards(schedule):
    """Return the schedule with every B as an I and, at the end, its W."""
    (actions,) = schedule.stages
    inputs = [a.of_kind(Kind.I) if a.kind is Kind.B else a for a in actions]
    weights = [a.of_kind(Kind.W) for a in actions if a.kind is Kind.B]
    return schedule.with_stages(((*inputs, *weights),), lowered=False)


def test_a_weight_gradient_left_out_is_noticed():
    with pytest.raises(AssertionError, match=r"weight gradients never computed: 0W1\.0"):
        run(split_backwards(one_f_one_b(1, 2, 3)), forget=Action.parse("0W1.0"))


def test_a_carry_that_is_never_released_is_noticed(monkeypatch):
    release = ExecutionContext.release_carry

    def forgetful(context, action):
        if action.micro_batch == 0:
            release(context, action)

    monkeypatch.setattr(ExecutionContext, "release_carry", forgetful)
    with pytest.raises(AssertionError, match=r"KV carry of .*0, 1.* never released"):
        run(one_f_one_b(1, 2, 3))


def test_after_a_failed_step_the_context_is_as_before():
    data = micro_batches(2, sum(LENGTHS))
    parts = [sub_sequences(LENGTHS)] * len(data)
    context = ExecutionContext()
    part = ModelPart(0, 1, sum(LENGTHS), context)
    computation = TinyComputation([part], data, parts, context)
    actions = split_backwards(one_f_one_b(1, 2, 3)).stages[0]

    def step(until=None):
        clock = ActionClock()
        execute(actions[:until], computation, NoLink(), context, parts, clock, stage=0)

    step()
    expected = [parameter.grad.clone() for parameter in part.parameters()]
    part.zero_grad()
    with pytest.raises(AssertionError, match=r"after the step|never"):
        step(until=len(actions) - 3)
    part.zero_grad()
    step()
    for parameter, gradient in zip(part.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_evaluation_gives_the_carry_back():
    context, _ = run(forward_only(1, 1, 3, 3))
    assert context.carries.bytes_in_use == 0
    assert context.carries.peak_bytes > 0
    assert context.action is None


def test_one_split_carries_nothing():
    data = micro_batches(1, 12)
    parts = [sub_sequences((12,))]
    context = ExecutionContext()
    computation = TinyComputation([ModelPart(0, 1, 12, context)], data, parts, context)
    actions = lower(one_f_one_b(1, 1)).stages[0]
    execute(actions, computation, NoLink(), context, parts, ActionClock(), stage=0)
    assert context.carries.bytes_held == 0


def test_clock_records_every_computation_in_order():
    schedule = one_f_one_b(1, 2, 3)
    _, clock = run(schedule)
    timed, length = clock.finish()
    assert tuple(entry.action for entry in timed) == schedule.stages[0]
    moments = [moment for entry in timed for moment in (entry.start, entry.end)]
    assert moments == sorted(moments)
    assert 0 <= moments[0] <= moments[-1] <= length


def test_context_outside_of_an_action():
    context = ExecutionContext()
    assert context.offset == 0
    tensors = [torch.randn(6, 1, 2, 4) for _ in range(3)]
    assert context.attend("layer", *tensors, scale=0.5).shape == (6, 1, 2, 4)
    assert context.carries.bytes_held == 0


def test_profiles_name_the_actions():
    with torch.profiler.profile() as profile:
        run(one_f_one_b(1, 1, 3))
    names = {event.key for event in profile.key_averages()}
    assert {"0F0.0", "0F0.1", "0B0.1", "0B0.0"} <= names
