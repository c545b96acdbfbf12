"""Loops of others' manner under ``enable``, against Megatron's own loop on the same ranks.

Run by torchrun on two ranks with the folder of examples as argument; rank 0 prints the largest
relative difference of any gradient in each situation, and the errors, as JSON.
"""

import json
import sys
from functools import partial
from itertools import cycle

import torch
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
import own_loop
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func as fetched_by_another_name
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import _build_default_pg_collection

from megatron.adaptor import enable

LENGTH, ROWS, NUMBER = 48, 2, 4
RUN = {"seq_length": LENGTH, "micro_batch_size": ROWS, "num_microbatches": NUMBER}


def model_and_config(**changes):
    torch.manual_seed(5)
    config = own_loop.configuration(torch.float64)
    for name, value in changes.items():
        setattr(config, name, value)
    return own_loop.build(config, LENGTH).double()


def batches(lengths=(LENGTH,)):
    made = [next(own_loop.sequences(length, ROWS, seed=length)) for length in lengths]
    return [{**batch, "weights": batch["weights"].double()} for batch in made]


def gradients(chunks, data, forward_step=own_loop.forward_step, **extra):
    chunks = chunks if isinstance(chunks, list) else [chunks]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [cycle(data) if data else None for _ in chunks]
    single = len(chunks) == 1
    reports = fetched_by_another_name()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else chunks,
        **RUN,
        **extra,
    )
    grads = [p.main_grad.clone() for chunk in chunks for p in chunk.parameters()]
    return grads, [report["loss"] for report in reports]


def difference(ours, wanted):
    """Return the largest over ranks of gradients and reported losses."""
    pairs = [*zip(ours[0], wanted[0], strict=True), *zip(ours[1], wanted[1], strict=True)]
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    result = torch.tensor([worst], dtype=torch.float64)
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result.item()


def against_own_loop(request, chunks, data, schedule="auto", **kwargs):
    enable(splits=1, schedule=schedule)
    wanted = gradients(chunks, data, **kwargs)
    enable(**request)
    return difference(gradients(chunks, data, **kwargs), wanted)


def message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def chunked(config):
    config.virtual_pipeline_model_parallel_size = 2
    config.microbatch_group_size_per_vp_stage = 2
    config.overlap_p2p_comm, config.batch_p2p_comm = True, False
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    torch.manual_seed(5)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = [
        GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=own_loop.VOCAB,
            max_sequence_length=LENGTH,
            pre_process=rank == 0 and chunk == 0,
            post_process=rank == 1 and chunk == 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=chunk,
        ).double()
        for chunk in range(2)
    ]
    wrapped = [
        own_loop.DistributedDataParallel(config, own_loop.DistributedDataParallelConfig(), chunk)
        for chunk in chunks
    ]
    config.finalize_model_grads_func = own_loop.finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in wrapped]
    return wrapped


def broadcast_step(data, model):
    """Read on one rank of tensor parallelism, and tell the others."""
    batch = next(data) if data is not None else None
    listed = [batch]
    dist.broadcast_object_list(
        listed, group=parallel_state.get_tensor_model_parallel_group(), group_src=0
    )
    return own_loop.forward_step(iter(listed), model)


def made_positions_step(data, model):
    batch = next(data)
    places = torch.arange(batch["input_ids"].shape[1]).expand(ROWS, -1)
    losses = model(batch["input_ids"], places, None, labels=batch["labels"])
    return losses, partial(own_loop.weighted_loss, batch["weights"])


def tuple_step(data, model):
    return own_loop.forward_step(iter([next(data)[0]]), model)


def documents_of(data):
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).expand(ROWS, -1)
    return [{**batch, "position_ids": positions} for batch in data]


def main():
    own_loop.join()
    found = {}
    model, data = model_and_config(), batches()
    stale = fetched_by_another_name()
    for name, request in {
        "average": {"splits": 4, "balance_method": "average"},
        "uniform_comp": {"splits": 3},
        "lengths": {"splits": 2, "lengths": [30, 18]},
        "verified": {"splits": 2, "verify": True},
    }.items():
        found[name] = against_own_loop(request, model, data)
    groups = _build_default_pg_collection()
    given = {
        "pg_collection": groups,
        "p2p_communicator": P2PCommunicator(groups.pp, own_loop.configuration(torch.float64)),
    }
    found["groups given"] = against_own_loop({"splits": 3}, model, data, **given)
    found["evaluation"] = len(gradients(model, data, forward_only=True)[1])
    enable(splits=1, documents="position_ids")
    wanted = gradients(model, documents_of(data))
    enable(splits=3, documents="position_ids")
    found["documents"] = difference(gradients(model, documents_of(data)), wanted)
    varying = model_and_config(variable_seq_lengths=True)
    # Megatron's loop mixes up shapes of the two directions where sends are no CUDA kernels.
    found["varying"] = against_own_loop(
        {"splits": 3}, varying, batches((48, 31, 40, 24)), schedule="1f1b"
    )

    errors = {}
    enable(splits=4)
    if dist.get_rank() == 0:  # the other stage would wait for this one
        errors["stale"] = message(
            lambda: stale(
                forward_step_func=own_loop.forward_step,
                data_iterator=cycle(data),
                model=model,
                **RUN,
            )
        )
    errors["positions"] = message(lambda: gradients(model, data, made_positions_step))
    dropping = model_and_config(attention_dropout=0.1)
    errors["dropout"] = message(lambda: gradients(dropping, data))
    enable(splits=2, schedule="zb-h1")
    errors["fusion"] = message(
        lambda: gradients(model_and_config(gradient_accumulation_fusion=False), data)
    )
    enable(splits=2 + dist.get_rank())
    errors["ranks"] = message(lambda: gradients(model, data))

    chunks = chunked(own_loop.configuration(torch.float64))
    found["chunks"] = against_own_loop({"splits": 2}, chunks, data)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    split = model_and_config(tensor_model_parallel_size=2)
    mine = data if dist.get_rank() == 0 else None
    found["tensor"] = against_own_loop({"splits": 3}, split, mine, forward_step=broadcast_step)
    errors["tuples"] = message(lambda: gradients(split, [(batch,) for batch in data], tuple_step))
    if dist.get_rank() == 0:
        print("ANSWER" + json.dumps([found, errors]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
