"""From command lines, presets and config.json files to settings, or to every fault."""

import json
import shlex

import pytest
import transformers

from seq1f1b.planner.arguments import Arguments
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.command_line import read_options, write_options
from seq1f1b.planner.errors import DataFileError, SettingError
from seq1f1b.planner.gpu import gpu, gpus
from seq1f1b.planner.huggingface import options_of_config
from seq1f1b.planner.layout import (
    LayoutError,
    deal,
    parse_layout,
    write_layout,
)
from seq1f1b.planner.model import expert_pattern
from seq1f1b.planner.presets import model_options, presets
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime, runtimes
from seq1f1b.planner.setting import megatron_values

BASE = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "seq_length": 4096}


def faults(values: dict[str, object], **options: object) -> str:
    with pytest.raises(SettingError) as caught:
        resolve(values, **options)
    return "\n".join(caught.value.faults)


def test_values_are_read_by_type():
    given = read_options(
        shlex.split(
            "--num-layers 8 --swiglu --disable-bias-linear --hidden-dropout 0 "
            "--recompute-granularity selective --recompute-modules mlp core_attn"
        )
    )
    assert given.values == {
        "num_layers": 8,
        "swiglu": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "recompute_granularity": "selective",
        "recompute_modules": ("mlp", "core_attn"),
    }


def test_flags_without_effect_are_listed():
    given = read_options(shlex.split("--lr 1e-4 --data-path a b --num-layers 2 --log-throughput"))
    assert given.values == {"num_layers": 2}
    assert given.ignored == ("--data-path", "--log-throughput", "--lr")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-layer 2", "--num-layer: neither Megatron nor this project has this option"),
        ("--num-layer 2", "did you mean --num-layers?"),
        ("--num-layers two", "--num-layers"),
        ("--normalization Norm", "--normalization"),
        ("--fp8-format hybrid", "--fp8-format: only bf16, fp16 and fp32 are modelled"),
        ("--use-megatron-fsdp", "--use-megatron-fsdp: sharded weights are not modelled"),
        ("--seq1f1b-turn 8", "--seq1f1b-turn: turns of whole micro-batches are modelled"),
        ("--cuda-graph-impl local", "--cuda-graph-impl: CUDA graphs are not modelled"),
        ("--mlp-chunks-for-training 2", "--mlp-chunks-for-training: MLPs in chunks are not"),
        ("--moe-expert-rank-capacity-factor 1", "-rank-capacity-factor: experts that drop tokens"),
        ("stray", "'stray' belongs to no option"),
    ],
)
def test_a_wrong_command_line_names_the_flag(words, message):
    with pytest.raises(SettingError, match=message.replace("?", r"\?")):
        read_options(words.split())


def test_options_are_written_as_they_are_read():
    words = shlex.split(
        "--num-layers 8 --swiglu --moe-layer-freq [0]*4+[1]*4 --num-experts 8 --seq1f1b-splits 4 "
        "--pipeline-model-parallel-layout 'Et*3|(tt|)*2tL' --recompute-modules mlp layernorm"
    )
    values = read_options(words).values
    assert read_options(write_options(values)).values == values


def test_fp32_needs_no_flag_of_megatrons():
    assert resolve(BASE | read_options(["--fp32"]).values).element_bytes == 4
    assert resolve(BASE).element_bytes == 2


@pytest.mark.parametrize("name", presets())
def test_every_preset_describes_a_model(name):
    setting = resolve(model_options(name) | {"seq_length": 4096})
    assert sum(len(chunk.layers) for stage in setting.chunks for chunk in stage) > 0


@pytest.mark.parametrize("name", gpus())
def test_every_gpu_has_figures_and_curves(name):
    described = gpu(name)
    assert described.usable_gib.value < described.memory_gib.value
    assert described.kernel_curves.gemm


def test_every_runtime_loads_and_2023_has_at_most_six_switches_of_its_own():
    assert set(runtimes()) == {"cpu", "current", "megatron-2023"}
    old, new = runtime("megatron-2023").model_dump(), runtime("current").model_dump()
    different = {name for name in old if old[name] != new[name]} - {"name", "title", "source"}
    assert len(different) <= 6


def test_a_missing_description_lists_those_that_there_are():
    with pytest.raises(DataFileError, match="a100-80g"):
        gpu("a100")
    with pytest.raises(DataFileError, match="llama-3-8b"):
        model_options("llama-9")


def test_a_description_with_a_wrong_field_is_named(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\ntitle: own\nsource: me\noptions: {num-layers: [1]}\n")
    with pytest.raises(DataFileError, match=r"own.yaml: options.num-layers"):
        model_options(str(path))
    path.write_text("name: own\ntitle: own\nsource: me\noptions: {layers-num: 1}\n")
    with pytest.raises(DataFileError, match=r"layers-num: there is no such option"):
        model_options(str(path))


def test_llama_from_a_config_file(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    length = {"seq_length": 8192}
    ours = resolve(model_options(str(tmp_path)) | length)
    assert ours.model == resolve(model_options("llama-3-8b") | length).model


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(),
        transformers.LlamaConfig(),
        transformers.Qwen2Config(use_sliding_window=False),
        transformers.Qwen3Config(),
        transformers.MixtralConfig(),
        transformers.Qwen3MoeConfig(),
        transformers.DeepseekV3Config(),
    ],
    ids=lambda config: config.model_type,
)
def test_transformers_own_configurations_are_read(config):
    values = options_of_config(config.to_dict(), "config.json")
    assert resolve(values | {"seq_length": 1024}).model.num_layers == config.num_hidden_layers


def test_an_unknown_family_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mamba"}')
    with pytest.raises(DataFileError, match="'mamba' is not known"):
        model_options(str(path))
    path.write_text("{")
    with pytest.raises(DataFileError, match="not a JSON file"):
        model_options(str(path))
    path.write_text('{"model_type": "llama", "num_attention_heads": 4}')
    with pytest.raises(DataFileError, match="num_hidden_layers"):
        model_options(str(path))


def test_layouts_are_unrolled_and_written():
    assert parse_layout("Ettt|(tt|)*2,m|L") == ["Ettt", "tt", "tt", "m", "L"]
    for counts in ([2, 3, 3, 3, 1], [4, 4], [1, 1, 1], [0, 5, 5, 4]):
        parts = parse_layout(write_layout(counts, 1))
        assert [part.count("t") for part in parts] == counts
        assert parts[0][0] == "E"
        assert parts[-1].endswith("mL")


def test_layers_are_dealt_as_megatron_deals_them():
    def counts(**values: object) -> list[list[int]]:
        arguments = Arguments(num_layers=8, **values)
        dealt = deal(
            arguments, (False,) * 8, 2, values.get("num_virtual_stages_per_pipeline_rank", 1)
        )
        return [[len(chunk.layers) for chunk in stage] for stage in dealt]

    assert counts() == [[4], [4]]
    assert counts(num_virtual_stages_per_pipeline_rank=2) == [[2, 2], [2, 2]]
    assert counts(decoder_first_pipeline_num_layers=3) == [[3], [5]]
    assert counts(pipeline_model_parallel_layout="Et*5|tttL") == [[5], [3]]
    with pytest.raises(LayoutError, match="--account-for-loss"):
        counts(account_for_loss_in_pipeline_split=True, decoder_last_pipeline_num_layers=3)
    with pytest.raises(LayoutError, match="the model has 8 layers"):
        counts(pipeline_model_parallel_layout="Et*5|ttttL")


def test_patterns_of_expert_layers():
    assert expert_pattern(2, 4) == (True, False, True, False)
    assert expert_pattern("([0]*1+[1]*2)*2", 6) == (False, True, True) * 2
    with pytest.raises(ValueError, match="has 3 layers, the model 4"):
        expert_pattern("[0]*3", 4)
    for wrong in ("__import__('os')", "[2]*4", "[[1]]*4", "[1", "1+1"):
        with pytest.raises(ValueError, match="lists of 0 and 1"):
            expert_pattern(wrong, 4)


def test_everything_that_is_missing_is_listed_at_once():
    listed = faults({})
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length"):
        assert f"{flag}: required" in listed


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"pipeline_model_parallel_size": 3}, {}, "--num-layers 8: 8 layers cannot be dealt"),
        ({"tensor_model_parallel_size": 3}, {}, "does not divide 8 heads"),
        ({"num_attention_heads": 7}, {}, "does not divide --hidden-size 512"),
        ({"max_position_embeddings": 64}, {}, "below --seq-length 4096"),
        ({"global_batch_size": 3}, {"num_gpus": 2}, "--global-batch-size 3: not a multiple of 2"),
        ({"tensor_model_parallel_size": 4}, {"num_gpus": 6}, "--gpus 6: not a multiple of 4"),
        ({"context_parallel_size": 3}, {}, "--seq-length 4096: not a multiple of 2 x"),
        ({"expert_model_parallel_size": 2}, {}, "needs --num-experts"),
        ({"num_experts": 6, "expert_model_parallel_size": 4}, {}, "does not divide --num-experts"),
        ({"recompute_granularity": "full"}, {}, "needs --recompute-method"),
        ({"recompute_modules": ("mlp",)}, {}, "needs --recompute-granularity selective"),
        ({"seq1f1b_recompute_loss": True}, {}, "goes with --seq1f1b-splits only"),
        (
            {"seq1f1b_recompute_loss": True, "mtp_num_layers": 1, "seq1f1b_splits": 2},
            {},
            "--seq1f1b-recompute-loss: cannot go with --mtp-num-layers",
        ),
        ({"seq1f1b_splits": 5000}, {}, "--seq1f1b-splits 5000"),
        ({"seq1f1b_splits": 4, "attention_dropout": 0.1}, {}, "sub-sequences need 0"),
        ({"num_layers": 0}, {}, "--num-layers 0: must be at least 1"),
        ({"fp16": True, "bf16": True}, {}, "choose one"),
        ({"mtp_num_layers": 1}, {}, "--mtp-num-layers: needs --position-embedding-type rope"),
        (
            {
                "mtp_num_layers": 1,
                "position_embedding_type": "rope",
                "seq1f1b_splits": 2,
                "context_parallel_size": 2,
                "cp_comm_type": ("a2a",),
            },
            {},
            "--mtp-num-layers: cannot go with --context-parallel-size and sub-sequences",
        ),
        (
            {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 4},
            {},
            "--num-layers-per-virtual-pipeline-stage 4: does not divide the 2 layers of a stage",
        ),
        ({"position_embedding_type": "relative"}, {}, "a GPT has no relative positions"),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            {},
            "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce",
        ),
        (
            {"seq1f1b_schedule": "1f1b", "attention_dropout": 0.1},
            {},
            "--attention-dropout 0.1: sub-sequences need 0",
        ),
        (
            {"pipeline_model_parallel_size": 4, "global_batch_size": 6},
            {"schedule": ScheduleName.INTERLEAVED},
            "needs a multiple of 4",
        ),
        (
            {"num_virtual_stages_per_pipeline_rank": 2},
            {},
            "need --pipeline-model-parallel-size of at least 2",
        ),
        (
            {"seq1f1b_splits": 2},
            {"schedule": ScheduleName.PLAIN},
            "--schedule 1f1b: cannot have 1 model chunk(s) a stage and 2 sub-sequence(s)",
        ),
    ],
)
def test_what_megatron_refuses_is_refused(changes, options, message):
    assert message in faults(BASE | changes, **options)


def test_what_was_not_given_is_assumed_in_words():
    setting = resolve(BASE, schedule=ScheduleName.SEQ)
    assert setting.num_splits == 4
    assert "--bf16" in setting.assumed
    assert "--seq1f1b-splits 4" in setting.assumed
    assert any("data-parallel replica" in entry for entry in setting.assumed)


def test_lengths_are_multiples_of_what_parallelism_deals_out():
    setting = resolve(
        BASE
        | {
            "tensor_model_parallel_size": 4,
            "sequence_parallel": True,
            "context_parallel_size": 2,
            "seq1f1b_splits": 3,
            "seq1f1b_multiple": 128,
        }
    )
    assert all(length % 128 == 0 for length in setting.lengths)
    assert sum(setting.lengths) == 4096


def test_1f1b_by_name_is_the_executors_own():
    """It runs whole micro-batches as Megatron's loop does, under the rules of sub-sequences."""
    shape = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    named = BASE | shape | {"seq1f1b_schedule": "1f1b", "global_batch_size": 3}
    setting = resolve(named | {"seq1f1b_recompute_loss": True})
    assert setting.runs_executor
    assert setting.schedule().num_micro_batches == 3  # which Megatron's own loop refuses
    values = megatron_values(setting)
    assert (values["attention_dropout"], values["seq1f1b_schedule"]) == (0.0, "1f1b")
    assert "needs a multiple of 2" in faults(BASE | shape | {"global_batch_size": 3})


def test_a_cap_is_written_for_greedy_only():
    capped = BASE | {"pipeline_model_parallel_size": 2, "seq1f1b_max_live": 4}
    capped |= {"global_batch_size": 4, "seq1f1b_splits": 2}
    assert megatron_values(resolve(capped))["seq1f1b_max_live"] is None
    greedy = resolve(capped, schedule=ScheduleName.GREEDY)
    assert megatron_values(greedy)["seq1f1b_max_live"] == 4


def test_a_setting_is_written_as_options_that_give_it_again():
    setting = resolve(
        BASE | {"pipeline_model_parallel_size": 4, "global_batch_size": 8},
        schedule=ScheduleName.SEQ_INTERLEAVED,
    )
    again = resolve(read_options(write_options(megatron_values(setting))).values)
    assert again.chunks == setting.chunks
    assert again.lengths == setting.lengths
    assert again.schedule() == setting.schedule()
