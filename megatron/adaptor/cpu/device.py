"""Megatron on a machine without a GPU: what it asks of CUDA is answered by the CPU and gloo.

``install`` replaces attributes of torch by name and touches nothing of Megatron, so a training
script, its command line and Megatron itself stay as they are. It has to run before Megatron is
imported, because Megatron copies some of these names on import. Every replacement is an entry of
``redirects()``: the object it belongs to, the names it replaces, and why.

The replacements stand in for one CUDA device per process that computes synchronously: streams
and events order nothing, memory is the process's resident set, and CUDA's random generator is
the CPU's default generator. Only ``torch.cuda`` pretends; ``torch.accelerator`` tells the truth,
so torch's own device-agnostic code goes on treating the machine as one without an accelerator.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._device as torch_device
import torch.utils.data

from megatron.adaptor.cpu import gloo as cpu_gloo
from megatron.adaptor.cpu import memory as cpu_memory

logger = logging.getLogger(__name__)

MESSAGE = "no CUDA device: training on CPU over gloo"

_installed = False


@dataclass(frozen=True)
class Redirect:
    """Names of ``owner`` that get new values, and the reason why they have to."""

    owner: Any
    values: dict[str, Any]
    reason: str


def installed() -> bool:
    """Whether this process runs on the CPU in place of CUDA."""
    return _installed


def has_gpu() -> bool:
    """Whether there is a CUDA device, rather than the CPU that ``install`` puts in its place."""
    return torch.cuda.is_available() and not _installed


def install() -> None:
    """Make this process train on the CPU if it has no CUDA device; otherwise do nothing.

    May be called any number of times.

    Raises:
        RuntimeError: Megatron was imported before, so that it holds names of torch which could
            no longer be replaced.
    """
    global _installed
    if _installed or has_gpu():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "this machine has no CUDA device and megatron.core is already imported: "
            "call megatron.adaptor.install() before the first import of Megatron"
        )
    _hide_gpu_packages()
    _quieten()
    cpu_memory.keep_freed_memory()
    cpu_gloo.prefer_loopback()
    cpu_gloo.share_device()
    for redirect in redirects():
        for name, value in redirect.values.items():
            setattr(redirect.owner, name, value)
    _installed = True
    is_child = multiprocessing.current_process().name != "MainProcess"
    if os.environ.get("RANK", "0") == "0" and not is_child:
        logger.warning(MESSAGE)


# ------------------------------------------------------------------------- what stands for CUDA


class Stream:
    """A stream on which every operation has finished by the time the call returns."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait_event(self, event: Event) -> None:
        """The event has already happened."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing is pending on the other stream either."""


class Event:
    """A point in the order of the program, with its time on the wall clock."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self._seconds: float | None = None

    def query(self) -> bool:
        return True

    def record(self, stream: Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to ``end_event``."""
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("Event.elapsed_time: both events have to be recorded first")
        return (end_event._seconds - self._seconds) * 1e3

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is pending."""


_STREAM = Stream()


def _stream_context(stream: Stream | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext(stream)


def _device_context(device: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _returns(value: Any) -> Callable[..., Any]:
    """A new function that returns ``value`` whatever it is asked.

    Names never share one function: torch.compile keeps rules for the functions of torch by
    identity, and stops at two names for one object.
    """
    return lambda *args, **kwargs: value


def _nothing() -> Callable[..., None]:
    """A new function for a request to the device that has no meaning on the CPU."""
    return _returns(None)


def _host_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _peak_memory() -> int:
    """Most bytes this process had resident at any time."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory() -> int:
    """Bytes this process has resident (the peak where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_memory()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory_stats(device: Any = None) -> dict[str, int]:
    current = _memory()
    peak = max(current, _peak_memory())
    stats = {"allocation.all.current": 0, "num_alloc_retries": 0, "num_ooms": 0}
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes"):
        stats |= {f"{kind}.all.current": current, f"{kind}.all.peak": peak}
    return stats


def _memory_info(device: Any = None) -> tuple[int, int]:
    total = _host_memory()
    return max(total - _memory(), 0), total


def _properties(device: Any = None) -> types.SimpleNamespace:
    # Megatron reads the version of the architecture only to demand settings that older GPUs need.
    return types.SimpleNamespace(
        name="cpu",
        major=10,
        minor=0,
        total_memory=_host_memory(),
        multi_processor_count=os.cpu_count() or 1,
    )


def _compile(model: Callable[..., Any] | None = None, **kwargs: Any) -> Callable[..., Any]:
    """``torch.compile`` that leaves a function, or the function it decorates, as it is."""
    return (lambda function: function) if model is None else model


# --------------------------------------------------------------------- devices and tensor types


def on_cpu(device: Any) -> Any:
    """The CPU in place of a CUDA device, any other device (or None) as it is.

    Accepts what torch accepts: ``'cuda'``, ``'cuda:1'``, a ``torch.device``, an index.
    """
    if isinstance(device, torch.device):
        is_cuda = device.type == "cuda"
    elif isinstance(device, str):
        is_cuda = device.partition(":")[0] == "cuda"
    else:
        is_cuda = isinstance(device, int) and not isinstance(device, bool)
    return torch.device("cpu") if is_cuda else device


def cuda_name(name: str) -> str:
    """The name of a tensor's type, ``torch.FloatTensor`` say, as if the tensor were on the GPU."""
    return "torch.cuda." + name.removeprefix("torch.").removeprefix("cuda.")


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``device=`` on the CPU and without pinned memory."""

    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return create


def _to(function: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.to``, whose device may also be its first positional argument."""

    @functools.wraps(function)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (on_cpu(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(self, *args, **kwargs)

    return to


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type``, which names a tensor on the CPU as if it were on the GPU.

    Megatron's optimizers compare these names to tell parameters by their precision.
    """

    @functools.wraps(function)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = function(self)
            return cuda_name(name) if self.device.type == "cpu" else name
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return function(self, dtype, *args, **kwargs)

    return type_


def _load(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def load(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function(file, on_cpu(map_location), *args, **kwargs)

    return load


def _device_context_init(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def init(self: Any, device: Any) -> None:
        function(self, on_cpu(device))

    return init


def _data_loader_init(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loader that neither pins memory nor draws from the generator that stands for CUDA's.

    Only one rank of a tensor-parallel group loads data. If loading drew a random number from the
    generator that the model's dropout uses, the ranks of the group would no longer agree.
    """

    @functools.wraps(function)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
        function(self, *args, **kwargs)
        self.pin_memory = False

    return init


def _hide_gpu_packages() -> None:
    """Make packages whose kernels need a GPU look absent, so that Megatron does without them."""
    for package in ("transformer_engine", "apex", "amp_C", "flash_attn", "flash_attn_3"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def _quieten() -> None:
    """Drop warnings that every machine without a GPU causes, from every rank at every step.

    CUDA's generator is the CPU's here, so each use of Megatron's random state tracker changes it.
    """
    for start in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=start)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


# ------------------------------------------------------------------------------------ the table

_EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine>=",
)

_TENSOR_TYPES = (
    "Float",
    "Double",
    "Half",
    "BFloat16",
    "Byte",
    "Char",
    "Short",
    "Int",
    "Long",
    "Bool",
)
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")

_CUDA_STATE = {
    "is_available": _returns(True),
    "is_initialized": _returns(True),
    "is_bf16_supported": _returns(True),
    "is_current_stream_capturing": _returns(False),
    "device_count": _returns(1),
    "current_device": _returns(0),
    "device": _device_context,
    "set_device": _nothing(),
    "get_device_name": _returns("cpu"),
    "get_device_properties": _properties,
    "get_device_capability": lambda device=None: (_properties().major, _properties().minor),
    "default_generators": (torch.default_generator,),
}
_CUDA_STREAMS = {
    "Stream": Stream,
    "Event": Event,
    "stream": _stream_context,
    "set_stream": _nothing(),
    "current_stream": _returns(_STREAM),
    "default_stream": _returns(_STREAM),
    "synchronize": _nothing(),
}
_CUDA_MEMORY = {
    "empty_cache": _nothing(),
    "ipc_collect": _nothing(),
    "reset_peak_memory_stats": _nothing(),
    "reset_max_memory_allocated": _nothing(),
    "memory_allocated": lambda device=None: _memory(),
    "memory_reserved": lambda device=None: _memory(),
    "device_memory_used": lambda device=None: _memory(),
    "max_memory_allocated": lambda device=None: _peak_memory(),
    "max_memory_reserved": lambda device=None: _peak_memory(),
    "memory_stats": _memory_stats,
    "mem_get_info": _memory_info,
}
_NVTX = {
    "range_push": _nothing(),
    "range_pop": _nothing(),
    "mark": _nothing(),
    "range": lambda *args, **kwargs: contextlib.nullcontext(),
}


def _factories() -> Iterable[Redirect]:
    """torch's factory functions, as torch itself lists them for ``with torch.device(...)``.

    Asking for the list before anything is replaced also fills its cache with the originals, which
    are what ``with torch.device(...)`` gets to see when a replacement calls them.
    """
    names = {function.__name__ for function in torch_device._device_constructors()} | set(_LIKE)
    values = {n: _factory(getattr(torch, n)) for n in sorted(names) if hasattr(torch, n)}
    yield Redirect(torch, values, "tensors are created on 'cuda' or on the current device")


def redirects() -> list[Redirect]:
    """The table of everything that ``install`` replaces."""
    tensor, table = torch.Tensor, list(_factories())
    cuda = _CUDA_STATE | _CUDA_STREAMS | _CUDA_MEMORY
    table.append(Redirect(torch.cuda, cuda, "Megatron asks for devices, streams and memory"))
    for module in (torch.cuda.random, torch.cuda.memory, torch.cuda.streams, torch.cuda.graphs):
        held = {name: value for name, value in cuda.items() if hasattr(module, name)}
        table.append(Redirect(module, held, "torch.cuda's modules hold copies of these names"))
    types_ = {f"{name}Tensor": getattr(torch, f"{name}Tensor") for name in _TENSOR_TYPES}
    moves = {
        "to": _to(tensor.to),
        "cuda": lambda self, *args, **kwargs: self,
        "pin_memory": lambda self, *args, **kwargs: self,
        "record_stream": _nothing(),
        "type": _type(tensor.type),
        **{name: _factory(getattr(tensor, name)) for name in _NEW},
    }
    context, loader = torch_device.DeviceContext, torch.utils.data.DataLoader
    return [
        *table,
        Redirect(torch.cuda, types_, "isinstance checks against the legacy CUDA tensor types"),
        Redirect(torch.cuda.nvtx, _NVTX, "ranges for NVIDIA's profilers"),
        Redirect(
            torch.accelerator,
            {"is_available": _returns(False), "current_accelerator": _returns(None)},
            "follows torch.cuda.is_available, but torch must not look for an accelerator",
        ),
        Redirect(tensor, moves, "tensors move to, and are named after, the current device"),
        Redirect(context, {"__init__": _device_context_init(context.__init__)}, "with 'cuda':"),
        Redirect(loader, {"__init__": _data_loader_init(loader.__init__)}, "pinning; generator"),
        Redirect(
            torch,
            {"load": _load(torch.load), "compile": _compile},
            "checkpoints map to 'cuda'; compiling needs a C++ compiler and takes minutes",
        ),
        *(Redirect(owner, cpu_gloo.replacements(), cpu_gloo.REASON) for owner in cpu_gloo.OWNERS),
    ]
