"""What a token of the model costs, by Megatron's arguments."""

import argparse

from seq1f1b.sequence import LatentAttention, TokenCost


def token_cost(args: argparse.Namespace) -> TokenCost:
    """Return the cost of the whole model; without the vocabulary while its size is not known."""
    return TokenCost.of_transformer(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        kv_channels=args.kv_channels,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        ffn_hidden_size=_ffn_width(args),
        gated_linear_unit=args.swiglu,
        vocab_size=getattr(args, "padded_vocab_size", None) or 0,
        latent=_latent_attention(args) if args.multi_latent_attention else None,
    )


def _ffn_width(args: argparse.Namespace) -> int:
    """Return the width that one token goes through, over all experts that it is sent to."""
    if not args.num_experts:
        return args.ffn_hidden_size
    expert = args.moe_ffn_hidden_size or args.ffn_hidden_size
    return expert * args.moe_router_topk + (args.moe_shared_expert_intermediate_size or 0)


def _latent_attention(args: argparse.Namespace) -> LatentAttention:
    return LatentAttention(
        query_rank=args.q_lora_rank,
        kv_rank=args.kv_lora_rank,
        head=args.qk_head_dim,
        rotary=args.qk_pos_emb_head_dim,
        value=args.v_head_dim,
    )
