"""One training process under the adaptor: the table of patches and the state that they share."""

import argparse
import atexit
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron.adaptor import distributed_optimizer, fallbacks, metrics, trace, weight_gradients
from megatron.adaptor.attention import (
    local_attention,
    local_attention_init,
    transformer_engine_attention,
)
from megatron.adaptor.batch import BatchCutter
from megatron.adaptor.experts import RouterLosses
from megatron.adaptor.lookahead import Lookahead
from megatron.adaptor.norms import sequence_parallel_norm
from megatron.adaptor.patches import Attribute, Patch
from megatron.adaptor.positions import cached_rotary_offset, rotary_offset
from megatron.adaptor.settings import Settings, add_arguments, refuse, settings_from
from megatron.adaptor.tokenizer import gpt2_from_files
from megatron.adaptor.transformer_engine import configuring
from seq1f1b.runtime import Channel, ExecutionContext
from seq1f1b.schedule import Kind

_CORE = "megatron.core"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_TRAINING = "megatron.training"


class Session:
    """What the replacements close over; there is one per process."""

    def __init__(self, device: str) -> None:
        self.context = ExecutionContext()
        self.cutter = BatchCutter(self.context)
        self.router_losses = RouterLosses(self.context)
        self.meter = metrics.StepMeter(self.context, device)
        self._settings: Settings | None = None
        self._args: argparse.Namespace | None = None
        self._groups: dict[tuple[Any, bool], dict[Channel, Any]] = {}

    @property
    def settings(self) -> Settings | None:
        """What the flags say; settings given here count instead of any flags."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings | None) -> None:
        self._settings, self._args = settings, None

    def patches(self) -> list[Patch | Attribute]:
        """Return every replacement in Megatron-Core, with its reason."""
        return [
            *fallbacks.patches(),
            *distributed_optimizer.patches(),
            *self._command_line_patches(),
            *self._step_patches(),
            *self._layer_patches(),
            *weight_gradients.patches(self.context),
        ]

    def _command_line_patches(self) -> list[Patch]:
        return [
            Patch(
                f"{_TRAINING}.arguments:add_megatron_arguments",
                ("parser",),
                "adds the flags of Seq1F1B to Megatron's",
                self._add_arguments,
            ),
            Patch(
                f"{_TRAINING}.arguments:validate_args",
                ("args",),
                "checks the flags before any process group is made",
                self._validate,
            ),
            Patch(
                f"{_CORE}.tokenizers.text.libraries.megatron_hf_tokenizer:"
                "MegatronHFTokenizer.__init__",
                ("tokenizer_path", "vocab_file", "merges_file"),
                "reads GPT-2's two tokenizer files without asking the hub",
                gpt2_from_files,
            ),
        ]

    def _step_patches(self) -> list[Patch]:
        return [
            Patch(
                f"{_SCHEDULES}:get_forward_backward_func",
                ("pp_size", "vp_size", "schedule_pg_collection"),
                "runs sub-sequences in the executor, and measures Megatron's own loops",
                self._forward_backward_func,
            ),
            Patch(
                f"{_SCHEDULES}:forward_step",
                ("forward_step_func", "data_iterator", "model", "vp_stage", "is_last_stage"),
                "times the forwards of Megatron's own loops",
                self.meter.timing(Kind.F),
            ),
            Patch(
                f"{_SCHEDULES}:backward_step",
                ("input_tensor", "output_tensor", "output_tensor_grad", "config"),
                "times the backwards of Megatron's own loops",
                self.meter.timing(Kind.B),
            ),
            Patch(
                f"{_TRAINING}.training:train_step",
                ("forward_step_func", "data_iterator", "model", "forward_backward_func"),
                "times whole iterations",
                self.meter.train_step,
            ),
            Patch(
                f"{_TRAINING}.training:pretrain",
                (),
                "lets all ranks leave together, so that none loses a connection it still uses",
                _leave_together,
            ),
            Patch(
                f"{_TRAINING}.training:training_log",
                ("loss_dict", "iteration"),
                "logs tokens/s, TFLOP/s, activation memory and bubble ratio",
                self._training_log,
            ),
        ]

    def _layer_patches(self) -> list[Patch]:
        return [
            Patch(
                f"{_CORE}.utils:get_batch_on_this_cp_rank",
                ("batch",),
                "cuts a micro-batch to the running sub-sequence",
                self.cutter.replacement,
            ),
            Patch(
                f"{_CORE}.transformer.dot_product_attention:DotProductAttention.forward",
                ("query", "key", "value", "attention_mask", "packed_seq_params"),
                "attends to earlier sub-sequences, with flash kernels instead of the full matrix",
                local_attention(self.context, self._masks_count),
            ),
            Patch(
                f"{_CORE}.transformer.dot_product_attention:DotProductAttention.__init__",
                ("softmax_scale",),
                "allows the head sizes of multi-latent attention, and context parallelism",
                local_attention_init,
            ),
            *self._transformer_engine_patches(),
            *self._expert_patches(),
            Patch(
                f"{_CORE}.transformer.torch_norm:WrappedTorchNorm.__new__",
                ("config", "hidden_size", "eps"),
                "gives sequence parallelism norms where apex is missing",
                sequence_parallel_norm,
            ),
            *Lookahead(self.context, self.cutter).patches(),
            Patch(
                f"{_CORE}.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",
                ("max_seq_len", "offset"),
                "rotary positions of a sub-sequence start at its offset",
                rotary_offset(self.context),
            ),
            Patch(
                f"{_CORE}.models.common.embeddings.yarn_rotary_pos_embedding:"
                "YarnRotaryEmbedding.forward",
                ("max_seq_len", "offset"),
                "rotary positions of a sub-sequence start at its offset",
                rotary_offset(self.context),
            ),
            Patch(
                f"{_CORE}.models.common.embeddings.yarn_rotary_pos_embedding:"
                "YarnRotaryEmbedding.get_cached_cos_sin",
                ("seq_len", "offset"),
                "keeps no cosines of one sub-sequence for another",
                cached_rotary_offset(self.context),
            ),
        ]

    def _expert_patches(self) -> list[Patch]:
        moe = f"{_CORE}.transformer.moe"
        router, exact = f"{moe}.router:TopKRouter", "keeps auxiliary losses of sub-sequences exact"
        return [
            Patch(f"{router}.routing", ("logits",), exact, self.router_losses.routing),
            Patch(f"{router}._apply_aux_loss", ("probs",), exact, self.router_losses.method),
            Patch(f"{router}._apply_seq_aux_loss", ("probs",), exact, self.router_losses.method),
            Patch(f"{router}.apply_z_loss", ("logits",), exact, self.router_losses.method),
            Patch(
                f"{moe}.moe_utils:switch_load_balancing_loss_func",
                ("probs", "tokens_per_expert", "total_num_tokens", "topk", "num_experts"),
                exact,
                self.router_losses.balance,
            ),
            Patch(f"{moe}.moe_utils:z_loss_func", ("logits",), exact, self.router_losses.z_loss),
        ]

    def _masks_count(self) -> bool:
        """Whether masks tell documents apart: only where the executor does not."""
        if self._args is not None:
            return self._args.reset_attention_mask
        return self.settings is not None and self.settings.packing is not None

    def _transformer_engine_patches(self) -> list[Patch]:
        from megatron.core.extensions.transformer_engine import HAVE_TE

        configuration = Patch(
            f"{_CORE}.transformer.transformer_config:TransformerConfig.__post_init__",
            ("self",),
            "lets transformer-engine's layers add up gradients of sub-sequences, in W if any",
            configuring(lambda: self._settings),
        )
        if not HAVE_TE:
            return [configuration]
        return [
            configuration,
            Patch(
                f"{_CORE}.extensions.transformer_engine:TEDotProductAttention.forward",
                ("query", "key", "value", "attention_mask", "attn_mask_type"),
                "attends to earlier sub-sequences",
                transformer_engine_attention(self.context),
            ),
        ]

    def _add_arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            return add_arguments(original(parser))

        return add_megatron_arguments

    def _validate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def validate_args(args: argparse.Namespace, defaults: Any = None) -> Any:
            result = original(args, defaults or {})
            settings, faults = settings_from(args)
            refuse(faults, args.rank)
            self._settings = settings
            if settings.packing is not None and settings.runs_executor:
                # All stages get the documents' boundaries; nobody reads an s x s mask.
                args.create_attention_mask_in_dataloader = False
            self._args = args
            self.meter.before_step = self._before_step
            return result

        return validate_args

    def _forward_backward_func(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            if self._args is not None:
                # Only now, with the tokenizer built, do they hold the size of the vocabulary.
                self._settings, _ = settings_from(self._args)
                self.context.use_kernel(self._settings.attention)
            if self.settings is None or not self.settings.runs_executor:
                return self.meter.around_loop(original(*args, **kwargs))
            return self._run_step

        return get_forward_backward_func

    def _run_step(self, **kwargs: Any) -> list[Any]:
        from megatron.training.utils import print_rank_0

        from megatron.adaptor.step import Step, describe, make_channel_groups

        assert self.settings is not None
        self.router_losses.forget()
        step = Step(self.settings, self.context, self.cutter, **kwargs)
        key = step.groups.pp, step.schedule.num_chunks > 1
        if key not in self._groups:
            self._groups[key] = make_channel_groups(key[0], interleaved=key[1])
            print_rank_0(f"> {describe(step.schedule)}; lengths {self._lengths(step.parts[0])}")
        is_first = self.context.kernel_taken is None
        reports = self.meter.measure(
            kwargs["model"], lambda clock: step.run(self._groups[key], clock)
        )
        if is_first and self.context.kernel_taken is not None:
            print_rank_0(f"> attention kernel of sub-sequences: {self.context.kernel_taken}")
        return reports

    def _training_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._log(args[3])
            return result

        return training_log

    def _before_step(self) -> None:
        """Let all stages begin the iteration that is traced at the same moment."""
        if self._traces(getattr(self._args, "curr_iteration", -1) + 1):
            torch.distributed.barrier(parallel_state.get_pipeline_model_parallel_group())

    def _traces(self, iteration: int) -> bool:
        settings = self.settings
        return bool(settings and settings.trace_file and iteration == settings.trace_iteration)

    def _trace(self) -> None:
        """Write the trace of the pipeline that rank 0 is in."""
        assert self.settings is not None
        assert self.settings.trace_file is not None
        group = parallel_state.get_pipeline_model_parallel_group()
        if 0 in torch.distributed.get_process_group_ranks(group):
            trace.write(self.settings.trace_file, self.meter.timed, group)

    def _log(self, iteration: int) -> None:
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size
        from megatron.training import get_args, print_rank_last
        from megatron.training.training import num_floating_point_operations

        if self._traces(iteration):
            self._trace()
        args = get_args()
        prints = iteration % args.log_interval == 0
        file = self.settings.metrics_file if self.settings else None
        if not prints and file is None:
            return
        batch_size = get_current_global_batch_size()
        operations = num_floating_point_operations(args, batch_size)
        entry = self.meter.iteration(iteration, operations, batch_size * args.seq_length)
        if entry is None or torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        if prints:
            print_rank_last(entry.log_line())
        if file is not None:
            metrics.append_json(entry, file)

    def _lengths(self, parts: Any) -> str:
        assert self.settings is not None
        if self.settings.packing is not None and self.settings.balance_method == "uniform_comp":
            return "by the documents of each micro-batch"
        return ", ".join(str(part.length) for part in parts)


def _leave_together(original: Callable[..., Any]) -> Callable[..., Any]:
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        torch.distributed.barrier()
        atexit.register(_close_groups)
        return result

    return pretrain


def _close_groups() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
