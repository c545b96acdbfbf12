"""What a converted checkpoint computes in Megatron's model, as its flags build it."""

import sys

import torch


def megatron_logits(jobs, tokens, num_stages, num_tensor):
    """Return logits on the last stage for each (checkpoint, flags), and tensors that are not read.

    None instead of logits on the other stages.
    """
    import os

    from megatron.adaptor import install

    install()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    from pretrain_gpt import model_config
    from seq1f1b_tools.checkpoint.torch_dist_reader import Checkpoint
    from tests.distributed.layouts import Layout

    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(torch.distributed.get_world_size())}
    Layout(stages=num_stages, tensor=num_tensor).enter()
    results, left = [], []
    for folder, flags in jobs:
        sys.argv = ["script", *flags, "--seq-length", "16", "--micro-batch-size", "1"]
        sys.argv += [
            "--tensor-model-parallel-size",
            str(num_tensor),
            "--no-gradient-accumulation-fusion",
        ]
        sys.argv += ["--pipeline-model-parallel-size", str(num_stages), "--train-iters", "1"]
        sys.argv += ["--use-cpu-initialization"]
        args = parse_args()
        validate_args(args)
        config = model_config(args)
        config.parallel_output = False
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = GPTModelBuilder(config).build_model(groups).eval()
        wanted = model.sharded_state_dict()
        kinds = (ShardedTensor, ShardedTensorFactory)
        keys = {leaf.key for leaf in _leaves(wanted) if isinstance(leaf, kinds)}
        state = dist_checkpointing.load(wanted, str(Checkpoint(folder).path))
        model.load_state_dict(state, strict=False)
        results.append(_forward(model, tokens, args.hidden_size))
        left.append(keys)
    return results, left


def _leaves(state):
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    else:
        yield state


def _forward(model, tokens, hidden_size):
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    if not model.pre_process:
        received = torch.empty(tokens.shape[1], tokens.shape[0], hidden_size)
        torch.distributed.recv(received, ranks[group.rank() - 1], group=group)
        model.set_input_tensor(received)
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = model(tokens, positions, None)
    if model.post_process:
        return output
    torch.distributed.send(output.contiguous(), ranks[group.rank() + 1], group=group)
    return None
