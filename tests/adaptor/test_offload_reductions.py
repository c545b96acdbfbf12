"""Reductions of a model chunk's gradients in its slot, and what Megatron then finds at home."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron.adaptor.offload.reductions import Reductions

START = torch.tensor([3.0, 4.0, 0.0, 0.0, 5.0, 12.0])
NORMS = [5.0, 13.0]
REDUCED = [6.0, 8.0, 0.0, 0.0, 10.0, 12.0]


@dataclass(eq=False)
class Config:
    """Megatron's, as far as it is looked at."""

    check_for_nan_in_grad: bool
    check_for_large_grads: bool


@dataclass(eq=False)
class Bucket:
    """One of Megatron's: part of a flat buffer."""

    grad_data: torch.Tensor
    offset: int


@dataclass(eq=False)
class Buffer:
    """Two buckets, and no parameters."""

    buckets: list[Bucket]
    params: list[Any] = field(default_factory=list)


class Group:
    """Stands for Megatron's group of a buffer's buckets: a reduction doubles its own shard."""

    def __init__(self, *, for_nan: bool, for_large: bool) -> None:
        home = torch.full_like(START, torch.nan)
        self.buckets = [Bucket(home[:4], 0), Bucket(home[4:], 4)]
        self.cached_grad_buffer_shard_list = [b.grad_data.chunk(2) for b in self.buckets]
        self.ddp_config = Config(for_nan, for_large)
        self.reductions = Reductions()
        self.done: list[Any] = []

    def start_grad_sync(self, **options: Any) -> None:
        self.reductions.start_grad_sync(Group.reduce, self, **options)

    def reduce(self, **options: Any) -> None:
        self.done.append(("reduce", options))
        if self.ddp_config.check_for_nan_in_grad or self.ddp_config.check_for_large_grads:
            self.done.append("host waits")
        for number, bucket in enumerate(self.buckets):
            own, _ = self.cached_grad_buffer_shard_list[number] or bucket.grad_data.chunk(2)
            own.mul_(2)

    def check_grads(self, for_nan: bool, for_large: bool) -> None:
        norms = [float(bucket.grad_data.norm(p=2)) for bucket in self.buckets]
        self.done.append(("check", for_nan, for_large, norms))


@dataclass(eq=False)
class Chunk:
    """A model chunk with one group."""

    bucket_groups: list[Group]
    expert_parallel_bucket_groups: list[Group] = field(default_factory=list)


def reduced(*, for_nan: bool, for_large: bool) -> tuple[Group, torch.Tensor]:
    """Return a group of buckets and gradients in a slot, which were reduced there."""
    group = Group(for_nan=for_nan, for_large=for_large)
    slot = START.clone()
    before = vars(group).copy()
    homes = [bucket.grad_data for bucket in group.buckets]
    group.reductions.begin([], None)
    group.reductions.reduce(Chunk([group]), {Buffer(group.buckets): slot})
    assert group.done == [("reduce", {})]
    assert vars(group) == before, "the group is not as it was"
    assert all(bucket.grad_data is home for bucket, home in zip(group.buckets, homes, strict=True))
    return group, slot


@pytest.mark.parametrize("checks", [(True, False), (True, True), (False, True)])
def test_gradients_are_reduced_on_the_device_and_checked_when_the_step_ends(checks):
    group, slot = reduced(for_nan=checks[0], for_large=checks[1])
    assert slot.tolist() == REDUCED
    group.start_grad_sync(force_all_reduce=False)
    assert group.done[1:] == [("check", *checks, NORMS)]
    assert all(bucket.grad_data.isnan().all() for bucket in group.buckets), "home was read"


def test_nothing_is_checked_that_megatron_would_not_check():
    group, slot = reduced(for_nan=False, for_large=False)
    assert slot.tolist() == REDUCED
    group.start_grad_sync(force_all_reduce=False)
    assert group.done == [("reduce", {})]


def test_a_second_reduction_is_megatrons():
    group, _ = reduced(for_nan=False, for_large=False)
    group.start_grad_sync(force_all_reduce=False)
    group.start_grad_sync(force_all_reduce=True)
    assert group.done[1:] == [("reduce", {"force_all_reduce": True})]


def test_a_step_that_broke_off_leaves_no_reduction_to_the_next():
    group, _ = reduced(for_nan=False, for_large=False)
    group.reductions.begin([], None)
    group.start_grad_sync()
    assert group.done[1:] == [("reduce", {})]
