"""A dispatched model: XTuner's lines, what calls it refuses, and what may be done with it."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq1f1b.ulysses import (
    CallError,
    dispatch_modules,
    init_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    shift_labels,
    split_for_sequence_parallel,
)
from seq1f1b.ulysses.check.batches import make_batch
from seq1f1b.ulysses.check.compare import gradient_errors, group, one_process
from seq1f1b.ulysses.shrink import VOCABULARY
from tests.ulysses.families import FAMILIES

LENGTH = 46


def data(num_rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        3, VOCABULARY, (num_rows, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    labels = ids.clone()
    labels[:, :20] = -100
    return ids, labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def users_lines(model: nn.Module, sp: int, num_rows: int, positions: bool) -> tuple[Tensor, Tensor]:
    """What a user of XTuner writes, with a length that the size does not divide."""
    input_ids, labels = data(num_rows)
    position_ids = torch.arange(LENGTH)[None] if positions else None
    attention_mask = None
    init_sequence_parallel(sp)
    dispatch_modules(model)
    input_ids, labels, position_ids, attention_mask = pad_for_sequence_parallel(
        input_ids, labels, position_ids, attention_mask
    )
    input_ids, labels, position_ids = split_for_sequence_parallel(input_ids, labels, position_ids)
    outputs = model(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        attention_mask=attention_mask,
    )
    loss = reduce_sequence_parallel_loss(outputs.loss, (labels != -100).sum())
    loss.backward()
    return loss.detach(), outputs.logits


def against_transformers(sp: int, num_rows: int, positions: bool) -> tuple[float, float]:
    ids, labels = data(num_rows)
    alone = FAMILIES["llama, GQA"].build()
    wanted = alone(input_ids=ids, labels=labels).loss
    wanted.backward()
    model = FAMILIES["llama, GQA"].build()
    loss, _ = users_lines(model, sp, num_rows, positions)
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    errors = gradient_errors(found, gradients(alone))
    return abs(float(loss - wanted)) / float(wanted), max(errors.values())


@pytest.mark.distributed
@pytest.mark.parametrize("sp", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("positions", [True, False])
def test_xtuners_lines_equal_one_process(workers, sp, num_rows, positions):
    for loss_error, gradient_error in workers(4).run(against_transformers, sp, num_rows, positions):
        assert loss_error < 1e-6
        assert gradient_error < 1e-5


def left_in_the_shard(name: str) -> tuple[float, float]:
    """Return loss and gradient errors when each rank attends to its own shard only."""
    size = dist.get_world_size()
    batch = make_batch("plain", VOCABULARY)
    wanted, wanted_gradients = one_process(FAMILIES[name].build(), batch)
    model = FAMILIES[name].build()
    init_sequence_parallel(size)
    ids, labels, positions = split_for_sequence_parallel(
        batch.input_ids, batch.labels, batch.position_ids
    )
    output = model(
        input_ids=ids, position_ids=positions, labels=labels, shift_labels=labels, use_cache=False
    )
    loss = reduce_sequence_parallel_loss(output.loss, (labels != -100).sum())
    loss.backward()
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= size
    errors = gradient_errors(found, wanted_gradients)
    return abs(float(loss.detach()) - wanted) / wanted, max(errors.values())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next", "gpt2", "deepseek_v3"])
def test_these_models_would_show_attention_left_in_the_shard(workers, name):
    for loss_error, gradient_error in workers(2).run(left_in_the_shard, name):
        assert loss_error > 1e-3
        assert gradient_error > 1e-1


def call_with(change: dict[str, Any]) -> str:
    """Call a dispatched model on two ranks with something changed; return what it says."""
    size = dist.get_world_size()
    parallel = init_sequence_parallel(size)
    model = dispatch_modules(FAMILIES["llama"].build())
    ids, labels = data(1)
    mask = torch.ones_like(ids)
    mask[:, -5:] = 0
    shares = split_for_sequence_parallel(ids, labels, torch.arange(LENGTH)[None])
    given: dict[str, Any] = {
        "input_ids": shares[0],
        "labels": shares[1],
        "position_ids": shares[2],
        "attention_mask": None,
    }
    match change.get("change"):
        case "unmarked labels":
            given["labels"] = shares[1] + 0
        case "split mask":
            given["attention_mask"] = mask[:, : shares[0].shape[1]]
        case "mask of pairs":
            given["attention_mask"] = torch.ones(1, 1, LENGTH, LENGTH)
        case "targets at padding":
            given["attention_mask"] = mask
        case "other rows":
            other = split_for_sequence_parallel(ids + parallel.rank, labels, None)
            given |= {"input_ids": other[0], "labels": other[1]}
        case "other lengths":
            given = {"input_ids": ids[:, : 10 + parallel.rank]}
        case "other masks":
            given = {"input_ids": shares[0], "attention_mask": mask * (1 - parallel.rank)}
        case "whole positions":
            given["position_ids"] = torch.arange(LENGTH)[None]
        case "three axes":
            given["position_ids"] = shares[2].expand(3, 1, -1)
        case "jumping positions":
            given["position_ids"] = shares[2] * 3
        case "both labels":
            given["shift_labels"] = given["labels"]
        case "cache":
            given["use_cache"] = True
        case "weights":
            given["output_attentions"] = True
        case "nothing":
            given = {}
        case "no attention":
            model.config._attn_implementation_internal = "eager"
    try:
        model(**given)
    except (CallError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "change, message",
    [
        ("unmarked labels", "labels are not shifted"),
        ("split mask", r"attention_mask must be the padding mask of whole rows, \(1, 46\)"),
        ("mask of pairs", "attention_mask must be the padding mask of whole rows"),
        ("targets at padding", "token 41 of a row is padding by attention_mask but has a target"),
        ("other rows", "ranks 0 and 1 .* different rows of tokens"),
        ("other lengths", "ranks 0 and 1 .* different tokens"),
        ("other masks", "ranks 0 and 1 .* different attention_mask"),
        ("whole positions", "position_ids must be"),
        ("three axes", "several axes"),
        ("jumping positions", "position_ids jump over tokens"),
        ("both labels", "labels and shift_labels"),
        ("cache", "cannot generate"),
        ("weights", "output_attentions"),
        ("nothing", "needs input_ids"),
        ("no attention", "attention implementation was changed"),
    ],
)
def test_a_call_that_cannot_be_exact_is_refused(workers, change, message):
    import re

    for said in workers(2).run(call_with, {"change": change}):
        assert re.search(message, said), said


def logits_of_group(size: int) -> float:
    """Return how far logits of a dispatched model in evaluation mode are from one process's."""
    parallel = init_sequence_parallel(size)
    ids, _ = data(2)
    alone, model = FAMILIES["mistral"].build(), dispatch_modules(FAMILIES["mistral"].build())
    with torch.no_grad():
        wanted = split_for_sequence_parallel(alone(input_ids=ids).logits, 1, parallel.group)
        found = model(split_for_sequence_parallel(ids, 1)).logits
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.distributed
def test_evaluation_without_labels_sees_the_whole_sequence(workers):
    assert max(workers(2).run(logits_of_group, 2)) < 1e-5


def by_cumulative_lengths() -> float:
    """Return the loss of a packed row whose documents cu_seqlens give, less that by positions."""
    init_sequence_parallel(dist.get_world_size())
    model = dispatch_modules(FAMILIES["llama"].build())
    ids, labels = data(1)
    bounds = torch.tensor([0, 12, 31, LENGTH], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (12, 19, 15)])[None]
    losses = []
    for more in ({"cu_seqlens": bounds}, {}):
        split = split_for_sequence_parallel(ids, labels, None if more else positions, **more)
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds} if more else {}
        output = model(input_ids=split[0], labels=split[1], position_ids=split[2], **lengths)
        losses.append(float(output.loss))
    return losses[0] - losses[1]


@pytest.mark.distributed
def test_documents_by_cumulative_lengths(workers):
    assert workers(2).run(by_cumulative_lengths) == [0.0, 0.0]


def recomputed(name: str, reentrant: bool) -> float:
    """Return the gradient error when two batches are recomputed after both ran forward."""
    size = dist.get_world_size()
    init_sequence_parallel(size)
    batches = [make_batch("packed", VOCABULARY, seed=s) for s in (3, 4)]
    batches[1] = make_batch("plain", VOCABULARY, length=36, seed=4)
    models = []
    for recompute in (False, True):
        model = dispatch_modules(FAMILIES[name].build().train())
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = []
        for batch in batches:
            ids, labels, positions = split_for_sequence_parallel(
                batch.input_ids, batch.labels, batch.position_ids
            )
            losses.append(model(input_ids=ids, labels=labels, position_ids=positions).loss)
        sum(losses).backward()
        models.append(model)
    found, wanted = (gradients(model) for model in models)
    return max(gradient_errors(wanted, found).values())


@pytest.mark.distributed
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama, GQA", "qwen3_next", "llama4_text", "falcon"])
def test_recomputation_sees_the_batch_it_ran_with(workers, name, reentrant):
    assert max(workers(2).run(recomputed, name, reentrant)) < 1e-5


def test_other_models_of_one_configuration_stay_as_they_are():
    from transformers import AutoModelForCausalLM

    init_sequence_parallel(1)
    model = FAMILIES["llama"].build()
    other = AutoModelForCausalLM.from_config(model.config)
    other.config = model.config
    ids, _ = data(1)
    with torch.no_grad():
        before = other(input_ids=ids).logits
        dispatch_modules(model)
        assert torch.equal(other(input_ids=ids).logits, before)
    assert model.config is not other.config
    assert set(model.state_dict()) == set(other.state_dict())


def test_a_copy_is_dispatched_and_stands_on_its_own():
    init_sequence_parallel(1)
    model = dispatch_modules(FAMILIES["llama, dynamic RoPE"].build())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    batch = make_batch("packed", VOCABULARY)
    (a, _), (b, _) = group(model, batch), group(twin, batch)
    assert a != b
    assert all(p.grad is not None for p in twin.parameters())


def test_dispatching_twice_changes_nothing():
    init_sequence_parallel(1)
    batch = make_batch("packed", VOCABULARY)
    model = dispatch_modules(FAMILIES["llama4_text"].build())
    once = group(model, batch)[0]
    assert group(dispatch_modules(model), batch)[0] == once


def test_the_users_random_numbers_are_left_alone():
    init_sequence_parallel(1)
    model = FAMILIES["qwen2"].build()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    dispatch_modules(model)
    assert torch.equal(torch.rand(3), wanted)


def test_shift_labels_may_be_given_by_transformers_own_keyword():
    init_sequence_parallel(1)
    model = dispatch_modules(FAMILIES["llama"].build())
    ids, labels = data(1)
    targets = shift_labels(labels)
    by_labels = model(input_ids=ids, labels=targets).loss
    by_keyword = model(input_ids=ids, shift_labels=targets + 0).loss
    assert torch.equal(by_labels, by_keyword)
    summed = model(input_ids=ids, labels=targets, num_items_in_batch=10).loss
    torch.testing.assert_close(summed * 10, by_labels * (targets != -100).sum())


def several_processes_without_groups() -> str:
    import seq1f1b.ulysses.mesh as mesh

    before, mesh._current[:] = list(mesh._current), []
    try:
        pad_for_sequence_parallel(torch.ones(1, 3, dtype=torch.long))
    except RuntimeError as error:
        return str(error)
    finally:
        mesh._current[:] = before
    return ""


@pytest.mark.distributed
def test_forgetting_to_set_up_is_refused(workers):
    for said in workers(2).run(several_processes_without_groups):
        assert "call init_sequence_parallel(size) on every rank" in said


def wrong_size() -> str:
    with pytest.raises(ValueError, match="3 does not divide the 2 ranks") as error:
        init_sequence_parallel(3)
    return str(error.value)


@pytest.mark.distributed
def test_a_size_that_does_not_divide_the_ranks_is_refused(workers):
    assert all(workers(2).run(wrong_size))


def test_size_two_needs_processes():
    with pytest.raises(RuntimeError, match="start them with torchrun"):
        init_sequence_parallel(2)


def test_importing_is_quick_and_leaves_transformers_out():
    program = (
        "import sys, torch, time; start = time.perf_counter(); import seq1f1b.ulysses;"
        "spent = time.perf_counter() - start;"
        "print(spent, 'transformers' in sys.modules, 'megatron' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, *present = run.stdout.split()
    assert float(seconds) < 5.0
    assert present == ["False", "False"]
