"""Which gradients are final on their arrival in host memory, and steps that end between updates."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, rerun_state_machine
from megatron.core.distributed import finalize_model_grads
from megatron.core.rerun_state_machine import RerunMode

from megatron.adaptor.offload import updates as module
from megatron.adaptor.offload.arrival import changes, changes_of, decisions, describe
from megatron.adaptor.offload.updates import UpdateError, Updates


class Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


class Model(torch.nn.Module):
    """A model chunk of Megatron's as far as it is looked at; what it has not is False."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.q_layernorm = torch.nn.Linear(1, 1, bias=False)
        config = {"sequence_parallel": False, "qk_layernorm": False, "mtp_num_layers": None}
        self.config = SimpleNamespace(**config)
        given = {"pre_process": False, "post_process": False, "mtp_process": False}
        for name, value in (given | attributes).items():
            setattr(self.config if name in config else self, name, value)
        self.share_embeddings_and_output_weights = attributes.get("tied", False)


def chunk(*, tensor: int = 1, **attributes: Any) -> Any:
    return SimpleNamespace(module=Model(**attributes), tp_group=Group(tensor))


def chain(**changes: Any) -> Any:
    """An optimizer of one part, and Megatron's configuration of its model."""
    options = {"clip_grad": 0.0, "grad_norm_skip_threshold": float("inf"), "grad_scaler": None}
    options |= {name: value for name, value in changes.items() if name in options}
    scaler = options.pop("grad_scaler")
    part = SimpleNamespace(
        config=SimpleNamespace(**options), grad_scaler=scaler, is_stub_optimizer=False
    )
    config = {"calculate_per_token_loss": False, "finalize_model_grads_func": finalize_model_grads}
    config |= {name: value for name, value in changes.items() if name not in options}
    return SimpleNamespace(chained_optimizers=[part]), SimpleNamespace(**config)


def of_all(optimizer: Any, config: Any) -> list[str]:
    """What keeps all chunks from an update on arrival."""
    return decisions(optimizer) + changes(optimizer, config)


@pytest.fixture
def machine(monkeypatch):
    """Megatron's machine that decides whether a step is run again."""
    machine = SimpleNamespace(get_mode=lambda: RerunMode.DISABLED)
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    return machine


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"clip_grad": 1.0}, "--clip-grad 1 (must be 0)"),
        ({"grad_scaler": object()}, "--fp16 or --loss-scale"),
        ({"calculate_per_token_loss": True}, "--calculate-per-token-loss"),
        ({"grad_norm_skip_threshold": 9.0}, "grad_norm_skip_threshold"),
        ({"finalize_model_grads_func": print}, "finalize_model_grads_func is not Megatron's"),
        ({"has_cond_embedder": True}, "gradients that all stages sum"),
        ({"flextron": True}, "gradients that all stages sum"),
    ],
)
def test_what_the_end_of_a_step_decides_keeps_all_chunks_from_it(machine, options, flag):
    assert of_all(*chain()) == []
    assert of_all(*chain(**options)) == [flag]


@pytest.mark.parametrize("mode", [RerunMode.VALIDATE_RESULTS, RerunMode.REPORT_DETERMINISM_STATS])
def test_a_step_that_may_run_again_keeps_all_chunks_from_it(machine, mode):
    machine.get_mode = lambda: mode
    assert of_all(*chain()) == [f"--rerun-mode {mode.value} (must be disabled)"]


EMBEDDINGS = ("pre_process", "post_process", "mtp_process")


@pytest.mark.parametrize(
    "attributes, flag",
    [
        ({"tensor": 2, "qk_layernorm": True}, "--sequence-parallel or --qk-layernorm"),
        *(
            ({"tied": True, of: True}, "no --untie-embeddings-and-output-weights")
            for of in EMBEDDINGS
        ),
        *(({"mtp_num_layers": 1, of: True}, "--mtp-num-layers") for of in EMBEDDINGS),
    ],
)
def test_gradients_that_ranks_sum_keep_their_chunk_from_it(attributes, flag):
    assert changes_of(chunk(**attributes)) == [flag]


@pytest.mark.parametrize("name", ["sequence_parallel", "average_gradients_across_tp_domain"])
def test_gradients_that_tensor_parallel_ranks_sum_keep_their_chunk_from_it(name):
    other = chunk(tensor=2, sequence_parallel=True)
    assert changes_of(other) == []
    setattr(other.module.q_layernorm.weight, name, True)
    assert changes_of(other) == ["--sequence-parallel or --qk-layernorm"]
    other.tp_group = Group(1)
    assert changes_of(other) == []


def test_position_embeddings_of_several_stages_keep_their_chunk_from_it(monkeypatch):
    monkeypatch.setattr(parallel_state, "_POSITION_EMBEDDING_GROUP", Group(2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert changes_of(chunk()) == []
    found = changes_of(chunk(pre_process=True))
    assert found == ["position embeddings of several stages"]


@pytest.mark.parametrize(
    "attributes",
    [{}, {"tied": True}, {"mtp_num_layers": 1}, {"tensor": 2}, {"post_process": True}],
)
def test_other_gradients_are_final_on_arrival(attributes):
    assert changes_of(chunk(**attributes)) == []


@pytest.mark.parametrize(
    "found, line",
    [
        ([[], []], "all model chunks"),
        ([["--a", "--b"], ["--a"]], "none, but at the end of the step: --a, --b"),
        (
            [["--a"], [], []],
            "model chunks 1, 2 of the first stage, and 0 at the end of the step: --a",
        ),
    ],
)
def test_a_line_says_what_applies_and_why_not(found, line):
    assert describe(found) == f"> just-in-time updates on arrival of gradients: {line}"


class Optimizer:
    """A chain of one part of Megatron's for several model chunks, which notes what it does."""

    is_stub_optimizer = False

    def __init__(self, num_chunks: int, config: Any) -> None:
        self.model_chunks = [self._chunk(config) for _ in range(num_chunks)]
        self.param_groups = [{"lr": 0.1, "params": [1]}]
        self.chained_optimizers = [self]
        self.config = SimpleNamespace(clip_grad=0.0, grad_norm_skip_threshold=float("inf"))
        self.grad_scaler = None
        self.done: list[tuple[str, int]] = []

    def _chunk(self, config: Any) -> Any:
        made: Any = Model()
        made.module, made.config, made.tp_group = Model(), config, Group(1)
        made.buffers = made.expert_parallel_buffers = []
        return made

    def part(self, optimizer: Any, chunk: Any) -> Any:
        """Stand for ``_part``."""
        number = self.model_chunks.index(chunk)

        def note(what: str) -> Any:
            return lambda: self.done.append((what, number))

        return SimpleNamespace(
            prepare_grads=note("prepare"),
            step_with_ready_grads=note("step"),
            zero_grad=note("zero"),
            start_param_sync_for_bucket_group_subset=note("sync"),
        )


class Training:
    """Updates of an optimizer whose steps are told one part after the other."""

    def __init__(self, monkeypatch: Any, num_chunks: int = 3) -> None:
        _, config = chain()
        vars(config).update(vars(Model().config))
        self.optimizer = Optimizer(num_chunks, config)
        monkeypatch.setattr(module, "_part", self.optimizer.part)
        settings: Any = SimpleNamespace(offload_just_in_time=True)
        self.updates = Updates(lambda: settings)
        self.begin()

    def begin(self) -> None:
        self.updates.zero_grad(lambda _: None, self.optimizer)
        self.updates.begin(self.optimizer.model_chunks, trains=True)

    def expect(self, number: int, arrived: Any = lambda: None) -> None:
        self.updates.expect(self.optimizer.model_chunks[number], arrived)

    def end(self) -> None:
        found_inf = self.updates.prepare_grads(lambda _: pytest.fail("twice"), self.optimizer)
        assert not found_inf
        self.optimizer.done.append(("norm", -1))
        assert self.updates.step(lambda _: pytest.fail("twice"), self.optimizer)

    def settle(self, number: int) -> None:
        self.updates.settle(self.optimizer.model_chunks[number])

    def of(self, number: int) -> list[str]:
        """What was done with one chunk's gradients, and when the norm was taken."""
        return [what for what, which in self.optimizer.done if which in (number, -1)]


def test_each_chunk_is_updated_once_and_its_gradients_stay_for_the_norm(machine, monkeypatch):
    training = Training(monkeypatch)
    training.updates._on_arrival -= {training.optimizer.model_chunks[0]}
    arrives = threading.Event()
    training.expect(2)
    training.updates._waiting[training.optimizer.model_chunks[2]].done.result(timeout=60)
    training.expect(1, arrives.wait)
    training.expect(0)
    assert training.of(2) == ["prepare", "step"]
    assert training.of(1) == training.of(0) == []
    arrives.set()
    training.end()
    for number in range(3):
        training.settle(number)
    assert training.of(2) == ["prepare", "step", "norm", "zero", "sync"]
    assert sorted(training.of(1)) == ["norm", "prepare", "step", "sync", "zero"]
    assert training.of(1).index("norm") < training.of(1).index("zero")
    assert training.of(0) == ["prepare", "norm", "step", "zero", "sync"]
    training.begin()


def test_the_lowest_chunk_that_waits_is_updated_first(machine, monkeypatch):
    training, arrives = Training(monkeypatch, 4), threading.Event()
    training.expect(3, arrives.wait)
    while training.updates._queued:  # until the thread has it
        threading.Event().wait(1e-3)
    for number in (2, 1, 0):
        training.expect(number)
    arrives.set()
    training.updates.settle_all()
    assert [number for what, number in training.optimizer.done if what == "step"] == [3, 0, 1, 2]


def test_a_failed_update_is_an_error_of_who_waits_for_it(machine, monkeypatch):
    def fail() -> None:
        raise OSError("no such memory")

    training = Training(monkeypatch)
    training.expect(2, fail)
    with pytest.raises(UpdateError, match=r"update of a model chunk failed: no such memory"):
        training.settle(2)


def test_nothing_goes_on_after_a_step_that_was_left_between_updates(machine, monkeypatch):
    training = Training(monkeypatch)
    training.expect(2)
    left = "1 of this stage's model chunks had begun to be updated .* resume from the last"
    with pytest.raises(UpdateError, match=left):
        training.begin()
    with pytest.raises(UpdateError, match=left):
        training.updates.begin(training.optimizer.model_chunks, trains=False)
    with pytest.raises(UpdateError, match=left):
        training.updates.after_all(lambda: pytest.fail("reads weights"))


def test_options_that_change_before_the_update_of_the_others_are_an_error(machine, monkeypatch):
    training = Training(monkeypatch)
    training.expect(2)
    training.optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(UpdateError, match="learning rate or other options changed"):
        training.end()


def test_nothing_is_updated_on_arrival_for_an_optimizer_that_is_not_the_models(
    machine, monkeypatch
):
    training, other = Training(monkeypatch), Training(monkeypatch)
    training.updates.begin(other.optimizer.model_chunks, trains=True)
    training.updates.expect(other.optimizer.model_chunks[0], lambda: pytest.fail("updates"))
    assert training.updates._waiting == {}
