"""Every row of the table of refusals is needed: its command line is accepted without it."""

import shlex

import pytest

from tests.programs import ask

# Reads cases [flags, values to set after parsing] and answers, for each, with the refusals of all
# rows by their number, and of the whole table; then with the flag of every row. Values stand for
# flags that Megatron refuses by itself on a machine without a GPU; has_gpu is that it has one.
_PROGRAM = """
import json, sys
from megatron.adaptor import install
install()
from megatron.adaptor.command_line import refusals
from megatron.adaptor.cpu import device
from megatron.training.arguments import validate_args
from tests.programs import parse_args
refusals.refuse = lambda faults, rank: None
table = refusals.TABLE
answers = []
for flags, values in json.loads(sys.stdin.read()):
    sys.argv = ["script", *flags]
    args = parse_args()
    refusals.TABLE = ()
    validate_args(args)
    has_gpu = values.pop("has_gpu", False)
    device.has_gpu = lambda: has_gpu
    for name, value in values.items():
        setattr(args, name, value)
    own = {}
    for number, row in enumerate(table):
        refusals.TABLE = (row,)
        _, faults = refusals.settings_from(args)
        if faults:
            own[number] = faults
    refusals.TABLE = table
    _, everything = refusals.settings_from(args)
    device.has_gpu = lambda: False
    answers.append([own, everything])
print("ANSWER" + json.dumps([answers, [row.flag for row in table]]))
"""
_BASE = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 "
    "--attention-dropout 0 --hidden-dropout 0 --pipeline-model-parallel-size 2 "
    "--position-embedding-type rope"
)
_OFFLOAD = (
    "--num-virtual-stages-per-pipeline-rank 2 --offload-model-chunks 1 --use-distributed-optimizer"
)
_LATE = f"{_OFFLOAD} --offload-just-in-time-updates"
_EXPERTS = "--num-experts 4 --disable-bias-linear"

# flags, values set after parsing, and what the refusal says
CASES: list[tuple[str, dict[str, object], str]] = [
    ("--seq1f1b-attention flash-attn-2", {}, "--seq1f1b-attention flash-attn-2 needs a package"),
    ("--seq1f1b-attention megatron", {}, "--seq1f1b-attention megatron keeps no keys and values"),
    (
        "--seq1f1b-splits 1 --seq1f1b-recompute-loss",
        {},
        "--seq1f1b-recompute-loss is not of Megatron's own loop",
    ),
    (
        "--seq1f1b-recompute-loss --mtp-num-layers 1",
        {},
        "--seq1f1b-recompute-loss cannot go with --mtp-num-layers",
    ),
    ("--seq1f1b-max-live 9", {}, "--seq1f1b-max-live 9 goes with --seq1f1b-schedule greedy only"),
    (
        "--seq1f1b-schedule zb-h1",
        {"transformer_impl": "transformer_engine"},
        "--seq1f1b-schedule zb-h1 with --transformer-impl transformer_engine",
    ),
    (
        "--seq1f1b-schedule zb-h1 --no-gradient-accumulation-fusion",
        {},
        "--seq1f1b-schedule zb-h1: leave out --no-gradient-accumulation-fusion",
    ),
    (
        "--seq1f1b-splits 1 --num-virtual-stages-per-pipeline-rank 2 --seq1f1b-trace-file t.jsonl",
        {},
        "--seq1f1b-trace-file cannot tell the micro-batches",
    ),
    (
        "--seq1f1b-trace-file t.jsonl --seq1f1b-trace-iteration 5",
        {},
        "--seq1f1b-trace-iteration 5: must be from 1 to --train-iters 4",
    ),
    ("--seq1f1b-verify", {"hidden_dropout": 0.1}, "--seq1f1b-verify compares two runs"),
    ("--attention-dropout 0.1", {}, "--attention-dropout must be 0"),
    ("--context-parallel-size 2", {}, "--cp-comm-type must be a2a"),
    (
        "--context-parallel-size 2 --cp-comm-type a2a --group-query-attention --num-query-groups 1",
        {},
        "--context-parallel-size times --tensor-model-parallel-size must divide",
    ),
    ("", {"hybrid_context_parallel": True}, "--hybrid-context-parallel is not supported"),
    (
        "--context-parallel-size 2 --cp-comm-type a2a --mtp-num-layers 1",
        {},
        "--mtp-num-layers cannot go with --context-parallel-size",
    ),
    (
        f"{_EXPERTS} --moe-expert-capacity-factor 1.5",
        {},
        "--moe-expert-capacity-factor drops other tokens",
    ),
    (
        _EXPERTS,
        {"moe_expert_rank_capacity_factor": 1.5},
        "--moe-expert-rank-capacity-factor drops other tokens",
    ),
    (_EXPERTS, {"moe_paged_stash": True}, "--moe-paged-stash drops other tokens"),
    (f"{_EXPERTS} --mlp-chunks-for-training 2", {}, "--mlp-chunks-for-training balances experts"),
    (_EXPERTS, {"moe_enable_routing_replay": True}, "--moe-enable-routing-replay records"),
    ("", {"moe_routing_trace_path": "trace"}, "--moe-routing-trace-path records"),
    ("", {"logits_save_dir": "logits"}, "--logits-save-dir records"),
    ("", {"logits_load_dir": "logits"}, "--logits-load-dir records"),
    ("", {"save_activations_interval": 2}, "--save-activations-interval records"),
    ("", {"save_dgrads_interval": 2}, "--save-dgrads-interval records"),
    ("", {"save_tokens_per_expert_interval": 2}, "--save-tokens-per-expert-interval records"),
    ("", {"perform_rl_step": True}, "--perform-rl-step is not supported"),
    ("", {"use_kitchen_attention": True}, "--use-kitchen-attention is not supported"),
    (
        "--num-virtual-stages-per-pipeline-rank 2 --global-batch-size 8 --seq1f1b-schedule greedy "
        "--microbatch-group-size-per-virtual-pipeline-stage 4",
        {},
        "--microbatch-group-size-per-virtual-pipeline-stage cannot go with --seq1f1b-schedule",
    ),
    (
        "--num-virtual-stages-per-pipeline-rank 2 --seq1f1b-splits 1 --seq1f1b-turn 4",
        {},
        "--seq1f1b-turn is not of Megatron's own loop",
    ),
    (
        "--offload-model-chunks 1 --use-distributed-optimizer",
        {},
        "--offload-model-chunks needs several model chunks a stage",
    ),
    (
        _OFFLOAD.replace("--use-distributed-optimizer", ""),
        {},
        "--offload-model-chunks takes its host copies from flat buffers",
    ),
    (
        f"{_OFFLOAD} --seq1f1b-schedule greedy",
        {},
        "--offload-model-chunks cannot go with --seq1f1b-schedule greedy",
    ),
    ("--offload-prefetch", {}, "--offload-prefetch goes with --offload-model-chunks only"),
    (
        "--offload-just-in-time-updates",
        {},
        "--offload-just-in-time-updates goes with --offload-model-chunks only",
    ),
    (f"{_LATE} --optimizer sgd", {}, "--optimizer sgd does not update chunk by chunk"),
    (_LATE, {"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer cannot go"),
    (_LATE, {"optimizer_cuda_graph": True}, "--optimizer-cuda-graph cannot go with"),
    (_LATE, {"qk_clip": True}, "--qk-clip cannot go with --offload-just-in-time-updates"),
    (f"{_LATE} --save-params-interval 2", {}, "--save-params-interval cannot go with"),
    ("--offload-link-gb-per-s 8", {}, "--offload-link-gb-per-s goes with --offload-model-chunks"),
    (
        f"{_OFFLOAD} --offload-link-roots 0,0",
        {},
        "--offload-link-roots goes with --offload-link-gb-per-s only",
    ),
    (f"{_OFFLOAD} --overlap-grad-reduce", {}, "--overlap-grad-reduce cannot go with"),
    (_OFFLOAD, {"overlap_param_gather": True}, "--overlap-param-gather cannot go with"),
    (f"{_OFFLOAD} --seq1f1b-verify", {}, "--seq1f1b-verify cannot go with"),
    (_OFFLOAD, {"optimizer_cpu_offload": True}, "--optimizer-cpu-offload cannot go with"),
    (_OFFLOAD, {"fp8_param_gather": True}, "--fp8-param-gather cannot go with"),
    (_OFFLOAD, {"fp4_param_gather": True}, "--fp4-param-gather cannot go with"),
    (_OFFLOAD, {"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute cannot"),
    (_OFFLOAD, {"delay_wgrad_compute": True}, "--delay-wgrad-compute cannot go with"),
    (_OFFLOAD, {"nccl_ub": True}, "--nccl-ub cannot go with"),
    (
        _OFFLOAD,
        {"ddp_param_name_patterns_for_fp32_local_accumulation": ["all"]},
        "--ddp-param-name-patterns-for-fp32-local-accumulation cannot go with",
    ),
    (_OFFLOAD, {"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards (and that of"),
    *(
        (_OFFLOAD, {"has_gpu": True, name: value}, f"{refusal} --offload-model-chunks on a GPU")
        for name, value, refusal in (
            ("fp16", True, "--fp16 cannot go with"),
            ("loss_scale", 8.0, "--loss-scale cannot go with"),
            (
                "use_precision_aware_optimizer",
                True,
                "--use-precision-aware-optimizer cannot go with",
            ),
            ("optimizer_cuda_graph", True, "--optimizer-cuda-graph cannot go with"),
            ("ddp_average_in_collective", True, "--ddp-average-in-collective cannot go with"),
            ("async_save", True, "--async-save cannot go with"),
            ("fp8", "hybrid", "--fp8-format cannot go with"),
            ("fp4", "e2m1", "--fp4-format cannot go with"),
        )
    ),
    (
        _OFFLOAD,
        {"has_gpu": True, "optimizer": "sgd"},
        "--optimizer sgd does not update model chunks",
    ),
    ("--seq1f1b-turn 4", {}, "--seq1f1b-turn goes with virtual stages"),
    (
        "--num-virtual-stages-per-pipeline-rank 2 --seq1f1b-turn 4 --global-batch-size 8 "
        "--microbatch-group-size-per-virtual-pipeline-stage 4",
        {},
        "--seq1f1b-turn and --microbatch-group-size-per-virtual-pipeline-stage both say",
    ),
    (
        f"{_EXPERTS} --moe-router-load-balancing-type global_aux_loss",
        {},
        "--moe-router-load-balancing-type must be of",
    ),
    (
        f"{_EXPERTS} --tensor-model-parallel-size 2",
        {},
        "--num-experts trains under --tensor-model-parallel-size only with",
    ),
    (
        "--mtp-num-layers 2 --mtp-use-repeated-layer",
        {},
        "--mtp-use-repeated-layer is not supported",
    ),
    (
        "--mtp-num-layers 2 --pipeline-model-parallel-layout Et|tt|tmm|L",
        {},
        "--pipeline-model-parallel-layout must put multi-token prediction",
    ),
    ("--hybrid-layer-pattern M*M*", {}, "--hybrid-layer-pattern is not supported"),
    ("", {"linear_attention_freq": 2}, "--linear-attention-freq is not supported"),
    (
        "",
        {"experimental_attention_variant": "gated_delta_net"},
        "--experimental-attention-variant is not supported",
    ),
    ("", {"qk_clip": True}, "--qk-clip is not supported"),
    ("", {"log_max_attention_logit": True}, "--log-max-attention-logit is not supported"),
    ("", {"cpu_offloading_num_layers": 2}, "--cpu-offloading-num-layers cannot tell"),
    ("--window-size 16,0", {}, "--window-size is not supported"),
    (
        "",
        {"fine_grained_activation_offloading": True},
        "--fine-grained-activation-offloading cannot tell",
    ),
    ("", {"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm is not"),
    ("", {"tp_comm_overlap": True}, "--tp-comm-overlap has buffers"),
    ("", {"use_megatron_fsdp": True}, "--use-megatron-fsdp is not supported"),
    ("", {"use_torch_fsdp2": True}, "--use-torch-fsdp2 is not supported"),
    ("", {"cuda_graph_impl": "local"}, "--cuda-graph-impl must be none"),
    ("", {"softmax_type": "learnable"}, "--softmax-type must be vanilla"),
    (
        "--reset-attention-mask --context-parallel-size 2 --cp-comm-type a2a",
        {},
        "--context-parallel-size cannot go with --reset-attention-mask",
    ),
    (
        "--reset-attention-mask --mtp-num-layers 1",
        {},
        "--mtp-num-layers cannot go with --reset-attention-mask",
    ),
]


def _splits(flags):
    return [] if "--seq1f1b-splits" in flags else ["--seq1f1b-splits", "4"]


@pytest.fixture(scope="module")
def found():
    lines = [
        [
            [*_BASE, *_splits(flags), *shlex.split(flags)],
            values,
        ]
        for flags, values, _ in CASES
    ]
    return ask(_PROGRAM, lines, RANK="0", WORLD_SIZE="4")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_case_is_refused_by_one_row(found, number):
    own, everything = found[0][number]
    _, _, expected = CASES[number]
    saying = [row for row, faults in own.items() if any(expected in fault for fault in faults)]
    assert len(saying) == 1, own
    assert any(expected in fault for fault in everything), everything


def test_no_row_goes_without_a_case(found):
    answers, flags = found
    covered = {
        row
        for (own, _), (_, _, expected) in zip(answers, CASES, strict=True)
        for row, faults in own.items()
        if any(expected in fault for fault in faults)
    }
    assert [flags[n] for n in range(len(flags)) if str(n) not in covered] == []


@pytest.mark.parametrize("has_gpu", [False, True])
def test_offloading_needs_no_other_flags_with_a_gpu_but_has_no_pace(has_gpu):
    paced = f"{_OFFLOAD} --offload-link-gb-per-s 8"
    late = f"{_LATE} --bf16 --offload-prefetch"
    cases = [[[*_BASE, *shlex.split(flags)], {"has_gpu": has_gpu}] for flags in (late, paced)]
    (_, plain), (_, with_pace) = ask(_PROGRAM, cases, RANK="0", WORLD_SIZE="4")[0]
    assert plain == []
    pace = "--offload-link-gb-per-s 8: is for rehearsals without a GPU"
    assert [fault[: len(pace)] for fault in with_pace] == [pace] * has_gpu


def test_folders_that_nothing_can_be_put_into_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    flags = ("--save", "--data-cache-path", "--tensorboard-dir")
    lines = [
        [_BASE, {flag.removeprefix("--").replace("-", "_"): str(folder)}]
        for flag in flags
        for folder in (file, file / "below", tmp_path / "new" / "below")
    ]
    answers, _ = ask(_PROGRAM, lines, RANK="0", WORLD_SIZE="4")
    for number, flag in enumerate(flags):
        is_file, below, new = (faults for _, faults in answers[3 * number : 3 * number + 3])
        expected = f"cannot be written into ({file} is not a folder): name another folder"
        assert is_file == [f"{flag} {file}: {expected}"]
        assert below == [f"{flag} {file}/below: {expected}"]
        assert new == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
