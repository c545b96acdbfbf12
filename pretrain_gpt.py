"""Pretrain or fine-tune a GPT with Megatron-Core, on Megatron's own command line.

    torchrun --nproc-per-node 2 pretrain_gpt.py --pipeline-model-parallel-size 2 --mock-data ...

The first two statements put Seq1F1B under Megatron; the rest is a Megatron training script that
knows nothing of it.
"""

# ruff: noqa: E402

import megatron.adaptor

megatron.adaptor.install()

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields
from functools import cache, partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

Batch = dict[str, torch.Tensor | None]

BATCH_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)


def has_documents(args: Namespace) -> bool:
    """Whether samples are packed documents, whose boundaries every stage has to know."""
    return args.sft or args.dataloader_inter_document_masking


@cache
def layout_of(text: str | None, num_stages: int) -> PipelineParallelLayerLayout | None:
    """Read --pipeline-model-parallel-layout, which Megatron keeps as text in its arguments."""
    return None if text is None else PipelineParallelLayerLayout.from_str(text, num_stages)


def predicts_more_tokens(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage holds multi-token prediction layers, which need tokens and labels."""
    if args.mtp_num_layers is None:
        return False
    return mtp_on_this_rank(
        layout=layout_of(args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size),
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=vp_stage is None,
        vp_stage=vp_stage,
    )


def reads_tokens(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this stage embeds tokens or computes a loss."""
    return is_first_or_last_pipeline_stage(vp_stage) or predicts_more_tokens(args, vp_stage)


def get_batch(data_iterator: Iterator | None, vp_stage: int | None) -> Batch:
    """This rank's part of the next micro-batch; entries this stage does not need are None."""
    args = get_args()
    if not reads_tokens(args, vp_stage) and not has_documents(args):
        return dict.fromkeys(BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {
            key: None if sample.get(key) is None else sample[key].cuda(non_blocking=True)
            for key in BATCH_KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=has_documents(args),
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_more_tokens(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not reads_tokens(args, vp_stage):
        return batch
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=mpu.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def packed_sequence(batch: Batch) -> PackedSeqParams | None:
    """The boundaries of the documents in ``batch``, as attention takes them."""
    if batch["cu_seqlens"] is None:
        return None
    boundaries = batch["cu_seqlens"][0]
    padded = None if batch["cu_seqlens_padded"] is None else batch["cu_seqlens_padded"][0]
    longest = int(batch["max_seqlen"].max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def loss_func(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of the tokens that count, their number, and both for the log.

    Args:
        loss_mask: 1 for tokens that count, otherwise 0. [b, s]
        losses: loss of each token. [b, s]

    Raises:
        RuntimeError: the sum is not finite (with Megatron's --check-for-nan-in-loss-and-grad).
    """
    mask = loss_mask.reshape(-1).float()
    loss_sum = torch.sum(losses.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("infinity", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss_sum,
                rejection_func=is_bad,
                message=f"the loss of a micro-batch is {name}",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss_sum.detach().view(1), num_tokens.view(1)])
    return loss_sum, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Iterator | None, model: GPTModel) -> tuple[torch.Tensor, partial]:
    """Run ``model`` on the next micro-batch; returns its output and what turns it into a loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_sequence(batch),
    )
    return output, partial(loss_func, batch["loss_mask"])


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset settings from its command line."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences = json.load(file)
    derived = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "inter_document_masking": args.dataloader_inter_document_masking,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "sequences_per_dataset": sequences,
    }
    same_name = {
        field.name: getattr(args, field.name)
        for field in fields(GPTDatasetConfig)
        if field.init and hasattr(args, field.name)
    }
    return GPTDatasetConfig(**(same_name | derived))


def train_valid_test_datasets_provider(
    num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> list:
    """Training, validation and test data sets with at least ``num_samples`` samples each.

    They are built on the ranks that read them: the first of each tensor-parallel group, on the
    first and last stage, or on every stage where samples are packed documents.
    """
    args = get_args()
    kind = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset

    def is_built_on_this_rank() -> bool:
        is_source = mpu.get_tensor_model_parallel_rank() == 0
        return is_source and (has_documents(args) or reads_tokens(args, vp_stage))

    print_rank_0(f"> building {kind.__name__} for training, validation and test ...")
    builder = BlendedMegatronDatasetBuilder(
        kind, num_samples, is_built_on_this_rank, dataset_config(args)
    )
    return builder.build()


# Every rank calls the provider, and decides there whether it needs data.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def get_embedding_ranks(ranks: list[int]) -> list[int]:
    """Of a pipeline's ``ranks``, those that hold the word embeddings."""
    args = get_args()
    holders = {ranks[0], *get_mtp_ranks(ranks, core_transformer_config_from_args(args))}
    if not args.untie_embeddings_and_output_weights:
        holders.add(ranks[-1])
    return sorted(holders)


def model_config(args: Namespace) -> GPTModelConfig:
    """What Megatron builds the model from; by itself it leaves --rope-scaling-factor out."""
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    return config


def main() -> None:
    """Train as the command line says."""
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, model_config(args)),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=get_embedding_ranks,
    )


if __name__ == "__main__":
    main()
