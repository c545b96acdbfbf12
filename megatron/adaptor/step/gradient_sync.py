"""When the data-parallel reduction of gradients may start."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from seq1f1b.schedule import Action, Kind


class GradientSync:
    """Starts data-parallel reduction with the action that completes a model chunk's gradients.

    That is its last B or W; until then Megatron's ``no_sync`` contexts are open. With
    ``grad_sync_func`` set (aligned reduction) Megatron wants to start it itself, after them all.

    actions: of this stage. chunks: its model chunks. config: Megatron's, of the first chunk.
    """

    def __init__(
        self, actions: Sequence[Action], chunks: Sequence[Any], config: Any, *, trains: bool
    ) -> None:
        self._chunks, self._config, self._trains = chunks, config, trains
        self._open: contextlib.ExitStack | None = None
        self._synced: set[int] = set()
        last = {a.chunk: a for a in actions if a.kind in (Kind.B, Kind.W)}
        self._closing = frozenset(last.values())

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Suspend reduction for a step, except where ``around`` enables it."""
        self._disable()
        sync_parameters = self._config.param_sync_func
        if sync_parameters is not None and self._trains:
            for chunk, start in zip(self._chunks, self._listed(sync_parameters), strict=True):
                start(chunk.parameters())
        try:
            yield
        finally:
            self._enable()
        start_sync = self._config.grad_sync_func
        if start_sync is not None and self._trains:
            for chunk, start in zip(self._chunks, self._listed(start_sync), strict=True):
                start(chunk.parameters())

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        """Let Megatron's hooks start the reduction if ``action`` is a B that closes a chunk."""
        if action not in self._closing or self._config.grad_sync_func is not None:
            yield
            return
        self._enable()
        self._synced.add(action.chunk)
        yield
        if len(self._synced) < len(self._chunks):
            self._disable()

    def after_weight_gradients(self, action: Action) -> None:
        """Do what Megatron's hooks do if ``action`` closes a chunk with deferred gradients.

        The hooks ran in the last backward, when the gradients were not complete.
        """
        chunk = self._chunks[action.chunk]
        with self.around(action):
            if action in self._closing and chunk.ddp_config.overlap_grad_reduce:
                for parameter, bucket_group in chunk.param_to_bucket_group.items():
                    bucket_group.register_grad_ready(parameter, chunk.force_all_reduce)

    def _listed(self, function: Any) -> list[Any]:
        return function if isinstance(function, list) else [function] * len(self._chunks)

    def _disable(self) -> None:
        no_sync = self._config.no_sync_func
        if no_sync is None or self._open is not None:
            return
        self._open = contextlib.ExitStack()
        for enter in no_sync if isinstance(no_sync, list) else [no_sync]:
            self._open.enter_context(enter())

    def _enable(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
