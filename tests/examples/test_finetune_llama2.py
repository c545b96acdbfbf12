"""Fine-tuning by a YAML file: every field counts, prompts are masked, and the whole runs."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.seq1f1b_tools.checkpoint.megatron_logits import megatron_logits
from tests.seq1f1b_tools.checkpoint.tiny_models import flags_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "finetune_llama2"
GIVEN = yaml.safe_load((EXAMPLE / "fine_tune.yaml").read_text())
_MODULES = ("settings", "model", "rows", "fine_tune")


@pytest.fixture(scope="module")
def example():
    """Return the example's modules, which import each other as a script's neighbours."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in _MODULES}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in _MODULES:
            sys.modules.pop(name, None)


def read(example, tmp_path, **changed):
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(GIVEN | changed))
    return example["settings"].read_settings(file)


def command(example, tmp_path, **changed) -> str:
    settings = read(example, tmp_path, **changed)
    megatron = tmp_path / "megatron"
    megatron.mkdir(exist_ok=True)
    (megatron / "megatron_flags.txt").write_text("--num-layers\n8\n")
    words = example["fine_tune"].training_command(
        settings, tmp_path / "rows.pt", megatron, tmp_path / "trained", tmp_path / "metrics"
    )
    return " ".join(map(str, words))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"batch_size": 16}, "--micro-batch-size 2 --global-batch-size 16"),
        ({"num_chunks": 4}, "--micro-batch-size 2 --global-batch-size 8"),
        ({"seq_length": 64}, "--seq-length 64"),
        ({"num_iterations": 9}, "--train-iters 9"),
        ({"num_stages": 4, "use_offload": False, "use_prefetch": False}, "--nproc-per-node 4"),
        ({"num_stages": 16, "num_layers": 16}, "--num-virtual-stages-per-pipeline-rank 4"),
        ({"num_stages": 16, "num_layers": 16}, "--offload-model-chunks 2"),
        ({"cuda_visible_devices": "2,0"}, "--pipeline-model-parallel-size 2"),
        ({"master_port": 4000}, "--master-port 4000"),
        ({"learning_rate": 0.5}, "--lr 0.5"),
        ({"use_prefetch": True}, "--offload-prefetch"),
    ],
)
def test_a_field_reaches_the_training_command(example, tmp_path, changed, words):
    assert words in command(example, tmp_path, **changed)


def test_a_field_that_is_off_does_not(example, tmp_path):
    assert "--offload-prefetch" not in command(example, tmp_path, use_prefetch=False)
    neither = command(example, tmp_path, use_offload=False, use_prefetch=False)
    assert "--offload" not in neither


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({"batchsize": 4}, "batchsize: Extra inputs are not permitted"),
        ({"batch_size": "64"}, "batch_size: Input should be a valid integer"),
        ({"use_offload": "yes"}, "use_offload: Input should be a valid boolean"),
        ({"cuda_visible_devices": "0;1"}, "cuda_visible_devices: String should match"),
        ({"cuda_visible_devices": "0,0"}, "one comes twice"),
        ({"cuda_visible_devices": "0"}, "a pipeline needs 2 or more"),
        ({"num_stages": 6}, "num_stages 6: must be a multiple of the number of GPUs, 4"),
        ({"num_layers": 7}, "num_layers 7: must be a multiple of num_stages, 8"),
        ({"num_chunks": 3}, "batch_size 8: must be a multiple of num_chunks"),
        ({"num_stages": 4}, "use_offload: needs 2 or more virtual stages a GPU"),
        ({"use_offload": False}, "use_prefetch: goes with use_offload only"),
    ],
)
def test_a_wrong_field_is_refused_by_name(example, tmp_path, changed, complaint):
    with pytest.raises(example["settings"].SettingsError) as error:
        read(example, tmp_path, **changed)
    assert complaint in str(error.value)
    assert "given.yaml" in str(error.value)


@pytest.fixture(scope="module")
def tiny(example, tmp_path_factory):
    return example["model"].make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({"embedding_dim": 4096}, "embedding_dim 4096: config.json of tiny has 64"),
        ({"ff_dim": 4096}, "ff_dim 4096: config.json of tiny has 128"),
        ({"num_heads": 8}, "num_heads 8: config.json of tiny has 4"),
        ({"num_layers": 16}, "num_layers 16: tiny has 8"),
    ],
)
def test_what_config_json_says_differently_is_refused(example, tmp_path, tiny, changed, complaint):
    settings = read(example, tmp_path, **changed)
    with pytest.raises(example["settings"].SettingsError, match=complaint):
        example["settings"].check_model(settings, str(tiny))


def test_fewer_layers_are_the_first_ones(example, tmp_path, tiny):
    from transformers import LlamaForCausalLM

    folder = example["model"].with_fewer_layers(str(tiny), 4, tmp_path / "shallow")
    shallow, whole = (LlamaForCausalLM.from_pretrained(path) for path in (folder, tiny))
    assert len(shallow.model.layers) == 4
    for name, weight in shallow.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name])


def test_prompts_are_masked_the_end_is_learned_and_documents_share_rows(example, tmp_path, tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    data = tmp_path / "data.jsonl"
    pairs = [("a long document", "short"), ("another", "brief"), ("third of them", "end")]
    data.write_text("".join(json.dumps({"document": d, "summary": s}) + "\n" for d, s in pairs))
    rows = torch.load(example["rows"].write_rows(str(data), tokenizer, 64, tmp_path))
    assert rows["tokens"].shape == (1, 64)
    (tokens,), (labels,), (mask,) = rows["tokens"], rows["labels"], rows["loss_mask"]
    bounds = rows["cu_seqlens"][0].unique().tolist()
    assert len(bounds) == 5  # three documents and the padding
    learned = []
    for start, stop in itertools.pairwise(bounds[:4]):
        assert torch.equal(rows["position_ids"][0, start:stop], torch.arange(stop - start))
        here = slice(start, stop)
        learned.append(tokenizer.decode(labels[here][mask[here] == 1]))
        assert torch.equal(
            labels[start : stop - 1][mask[start : stop - 1] == 1],
            tokens[start + 1 : stop][mask[start : stop - 1] == 1],
        )
        assert mask[stop - 1] == 0  # nothing predicts the next document
    assert sorted(learned) == sorted(f"{summary}{tokenizer.eos_token}" for _, summary in pairs)
    assert mask[bounds[3] :].sum() == 0


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_train_sh_ends_with_weights_that_have_learned(tmp_path, workers):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "fine_tune.yaml"
    data = str(EXAMPLE / "summaries.jsonl")
    changed = {"dataset": data, "save_dir": "out", "num_iterations": 4, "master_port": 29541}
    changed["save_megatron"] = True
    file.write_text(yaml.safe_dump(GIVEN | changed))
    environment = os.environ | {"PYTHON": sys.executable}
    again = ["bash", EXAMPLE / "train.sh", file]
    run = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["losses"][-1] < results["losses"][0] - 0.5
    assert results["chunk_loads_by_stage"] == [3] * 4
    folder = tmp_path / "out" / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token is None
    assert model.config.vocab_size > len(tokenizer)  # came back whole
    record = json.loads(Path(data).read_text().splitlines()[0])
    prompt = tokenizer(record["document"])["input_ids"]
    answer = [*tokenizer(record["summary"])["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    assert float(model(ids, labels=labels).loss) < results["losses"][0] - 0.5
    assert math.isfinite(results["seconds"])
    trained = tmp_path / "out" / "megatron"
    (((logits,), _),) = workers(1).run(megatron_logits, [(trained, flags_of(trained))], ids, 1, 1)
    assert logits.dtype == model.dtype == torch.float32
    with torch.no_grad():
        expected = model(ids).logits
    error = (logits[..., : expected.shape[-1]] - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()
    refused = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "holds a fine-tuned model already" in refused.stderr
