"""Whole runs: against plain torch, killed and resumed, on other ranks, exported, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seq1f1b.ulysses.training.data import Order, prepare_rows
from seq1f1b.ulysses.training.recipe import Recipe, RecipeError
from seq1f1b.ulysses.training.schedule import learning_rate
from seq1f1b.ulysses.training.tokenizer import make_tokenizer
from seq1f1b.ulysses.training.trainer import train
from tests.ulysses.training.recipes import recipe, write_texts

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def run(settings: Recipe, folder: Path, resume: str | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train(settings, folder, resume)
    except RecipeError as error:
        return str(error)
    return ""


def by_plain_torch(settings: Recipe, cache: Path) -> list[float]:
    """Train the same model on the same rows in one process, document by document."""
    tokenizer, name = make_tokenizer(settings)
    rows = prepare_rows(settings.data, tokenizer, name, cache)
    config = dict(settings.model.config or {})
    from transformers import AutoConfig

    made = AutoConfig.for_model(config.pop("model_type"), **config, vocab_size=len(tokenizer))
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    options = settings.training
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=options.betas,
        eps=options.eps,
    )
    assert options.steps is not None
    found = []
    for step in range(options.steps):
        documents = [
            rows.store.tokens[rows.store.bounds[p.document] + p.start :][: p.length]
            for index in Order(len(rows.rows), options.global_batch_size, settings.seed).step(step)
            for p in rows.rows[index]
        ]
        num_targets = sum(len(d) - 1 for d in documents)
        total = 0.0
        for document in documents:
            ids = torch.tensor(document.astype("int64"))[None]
            loss = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) / num_targets
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, options.steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (1, {"sequence_parallel_size": 1}),
        pytest.param(2, {}, marks=pytest.mark.long),
        pytest.param(
            *(4, {"training.micro_batch_size": 2, "memory.recompute": "none"}),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(4, {"sequence_parallel_size": 4, "memory.loss_tile": 8, "memory.mlp_tile": 8}),
            marks=pytest.mark.long,
        ),
        (2, {"memory.subsequences": 3, "memory.unit_at_a_time": True}),
        (2, {"memory.recompute": "offload", "memory.cpu_offload": True}),
    ],
)
def test_a_run_equals_plain_torch(workers, texts, tmp_path, ranks, changes):
    settings = recipe(texts, **changes)
    assert workers(ranks).run(run, settings, tmp_path) == [""] * ranks
    wanted = by_plain_torch(settings, tmp_path / "data")
    for a, b in zip(losses(tmp_path), wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_rows_may_have_fewer_tokens_than_sub_sequences(workers, tmp_path):
    """Other groups compute as many sub-sequences, and wait for this one."""
    texts = tmp_path / "short.jsonl"
    texts.write_text("".join(f'{{"text": "{"ab" * (1 + i % 5)}"}}\n' for i in range(20)))
    changes = {"data.packing": "none", "memory.subsequences": 5, "data.max_length": 24}
    settings = recipe(texts, **changes)
    assert workers(4).run(run, settings, tmp_path / "run") == [""] * 4
    wanted = by_plain_torch(settings, tmp_path / "run" / "data")
    assert losses(tmp_path / "run") == pytest.approx(wanted, rel=1e-5)


def test_a_killed_run_goes_on_bit_by_bit(workers, texts, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = recipe(texts)
    workers(2).run(run, settings, whole)
    workers(2).run(run, settings, killed)
    # as if it had been killed while it wrote its last checkpoint
    last = killed / "checkpoints" / "step-6"
    last.rename(last.with_name("step-6.partial"))
    shutil.rmtree(killed / "model")
    (killed / "metrics.jsonl").unlink()
    assert workers(2).run(run, settings, killed, "auto") == ["", ""]
    assert losses(killed) == losses(whole)[3:]
    one, other = (load(folder / "model") for folder in (whole, killed))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "ranks, size",
    [(1, 1), *(pytest.param(*other, marks=pytest.mark.long) for other in ((2, 1), (4, 2), (4, 4)))],
)
def test_a_run_goes_on_over_other_ranks(workers, texts, tmp_path, ranks, size):
    workers(2).run(run, recipe(texts), tmp_path)
    wanted = losses(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    settings = recipe(texts, sequence_parallel_size=size)
    workers(ranks).run(run, settings, tmp_path, "auto")
    for a, b in zip(losses(tmp_path), wanted[3:], strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_model_is_for_use(workers, texts, tmp_path):
    workers(2).run(run, recipe(texts), tmp_path)
    model, tokenizer = load(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config._attn_implementation != "seq1f1b_ulysses"
    ids = tokenizer("1 plus 2", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, ids.shape[1] + 4)
    again = tmp_path / "again"
    settings = recipe(
        texts, **{"model.config": None, "model.name": str(tmp_path / "model"), "training.steps": 1}
    )
    assert workers(2).run(run, settings, again) == ["", ""]
    assert losses(again)[0] < losses(tmp_path)[0]


def test_old_checkpoints_go(workers, texts, tmp_path):
    settings = recipe(texts, **{"checkpoints.every": 1, "checkpoints.keep": 2})
    workers(2).run(run, settings, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-5", "step-6"]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "ranks, changes, message",
    [
        (2, {"sequence_parallel_size": 4}, "sequence_parallel_size: 4 does not divide the 2"),
        (2, {"training.global_batch_size": 5, "training.micro_batch_size": 2}, "a multiple of 2"),
        (1, {"data.max_length": 512}, "the model knows 256 positions; set max_position_embeddings"),
        (1, {"model.config": {"model_type": "zebra"}}, "model.config: "),
        (1, {"data.tokenizer": None}, "data.tokenizer: missing"),
        (1, {"memory.mlp_tile": 4, "model.config": {"model_type": "opt"}}, "mlp_tile: "),
        (1, {"rope": {"rope_type": "yarn"}, "model.config": {"model_type": "gpt2"}}, "no RoPE"),
        (1, {"model.config.vocab_size": 100}, "vocab_size: the model knows 100 tokens, and the da"),
        (1, {"model.config.hidden_act": "sillu"}, "transformers has nothing named 'sillu'"),
        (1, {"model.config": {"model_type": "t5"}}, "model.config: Unrecognized configuration cl"),
        (1, {"model.attention_core": "flesh"}, "no attention core 'flesh'"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(workers, texts, tmp_path, ranks, changes, message):
    if ranks == 1:
        changes = {"sequence_parallel_size": 1, **changes}
    for said in workers(ranks).run(run, recipe(texts, **changes), tmp_path):
        assert message in said
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_is_not_overwritten_and_another_is_not_continued(workers, texts, tmp_path):
    workers(2).run(run, recipe(texts), tmp_path)
    said = workers(2).run(run, recipe(texts), tmp_path)[0]
    assert "holds a run of step-6; continue it with --resume" in said
    other = recipe(texts, seed=1)
    said = workers(2).run(run, other, tmp_path, "auto")[0]
    assert "was written with seed 0, and the recipe says 1" in said
    said = workers(2).run(run, recipe(texts), tmp_path, str(tmp_path / "nowhere"))[0]
    assert "is no complete checkpoint" in said
