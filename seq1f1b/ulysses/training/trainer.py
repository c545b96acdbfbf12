"""A training run, from a recipe to a model for use."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import yaml
from torch import Tensor

import seq1f1b
from seq1f1b.agreement import check_same, digest_of_code
from seq1f1b.ulysses.batch import pad_for_sequence_parallel, split_for_sequence_parallel
from seq1f1b.ulysses.labels import IGNORED
from seq1f1b.ulysses.loss import reduce_sequence_parallel_loss
from seq1f1b.ulysses.memory.subsequences import backward_in_subsequences
from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.training.checkpoints import (
    Checkpoints,
    Progress,
    choose,
    export,
    require_shared,
)
from seq1f1b.ulysses.training.data import Order, PackedRows, RowBatch, prepare_rows
from seq1f1b.ulysses.training.engine import Engine
from seq1f1b.ulysses.training.model import make_config
from seq1f1b.ulysses.training.recipe import Recipe, RecipeError, leaves
from seq1f1b.ulysses.training.report import Reporter, SilentReporter
from seq1f1b.ulysses.training.schedule import learning_rate
from seq1f1b.ulysses.training.setup import make_engine, make_groups, num_micro_batches
from seq1f1b.ulysses.training.tokenizer import make_tokenizer


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks: mean loss, gradient norm, tokens and targets."""

    loss: float
    grad_norm: float
    num_tokens: int
    num_targets: int


@dataclass(frozen=True)
class Trainer:
    """Everything that a step needs."""

    recipe: Recipe
    parallel: SequenceParallel
    engine: Engine
    rows: PackedRows
    device: str
    num_steps: int

    def step(self, number: int) -> StepResult:
        """Do step ``number``, counted from 0.

        The loss is the mean over all targets of the step, whatever the ranks and micro-batches.
        """
        settings = self.recipe.training
        order = Order(len(self.rows.rows), settings.global_batch_size, self.recipe.seed)
        own = order.step(number)[self.parallel.data_rank :: self.parallel.data_size]
        size = settings.micro_batch_size
        # a token of each sub-sequence for each rank: all groups compute as many of them
        least = self.recipe.memory.subsequences * self.parallel.size
        batches = [self.rows.batch(own[i : i + size], least) for i in range(0, len(own), size)]
        counts = torch.tensor(
            [sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches)]
        )
        self._sum_over_groups(counts)
        num_targets, num_tokens = (int(x) for x in counts)
        total = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(batches):
            weight = self.parallel.data_size * batch.num_targets / max(num_targets, 1)
            is_last = index == len(batches) - 1
            loss = self._backward(batch, weight, is_last=is_last)
            total += float(loss) * weight / self.parallel.data_size
        self._sum_over_groups(total)
        rate = learning_rate(settings, number, self.num_steps)
        return StepResult(float(total), self.engine.step(rate), num_tokens, num_targets)

    def _sum_over_groups(self, x: Tensor) -> None:
        if self.parallel.data_group is not None:
            dist.all_reduce(x, group=self.parallel.data_group)

    def _backward(self, batch: RowBatch, weight: float, *, is_last: bool) -> Tensor:
        """Do forward and backward of whole rows; return the group's mean loss."""
        batch = batch.to(self.device)
        given = batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask
        count = self.recipe.memory.subsequences
        if count > 1:
            left = iter(range(count - 1, -1, -1))
            return backward_in_subsequences(
                self.engine.model,
                *given,
                subsequences=count,
                backward=lambda loss: self.engine.backward(
                    loss * weight, is_last=is_last and next(left) == 0
                ),
            )
        input_ids, labels, position_ids, mask = pad_for_sequence_parallel(*given)
        input_ids, labels, position_ids = split_for_sequence_parallel(
            input_ids, labels, position_ids
        )
        output = self.engine.model(
            input_ids=input_ids, labels=labels, position_ids=position_ids, attention_mask=mask
        )
        loss = reduce_sequence_parallel_loss(output.loss, (labels != IGNORED).sum())
        self.engine.backward(loss * weight, is_last=is_last)
        return loss.detach()


def train(
    recipe: Recipe, folder: Path, resume: str | None = None, deepspeed: str | None = None
) -> Path:
    """Run a recipe on all ranks, which are joined already; return the folder of the model.

    resume: "auto" for the latest checkpoint in ``folder``, or a checkpoint. deepspeed: a setting
    that comes with the package, or a file; without it FSDP2 divides the model. Raises RecipeError
    and DataError before the first step, and RanksDifferError when ranks have different recipes,
    models or data.
    """
    check_same(_comparable(recipe, deepspeed))
    parallel = make_groups(recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoints.keep)
    start = choose(folder, resume, checkpoints)
    tokenizer, name = make_tokenizer(recipe)
    config = make_config(recipe, len(tokenizer))
    rows = prepare_rows(recipe.data, tokenizer, name, folder / "data")
    check_same({"the model": config.to_json_string(), "the encoded data": rows.store.digest()})
    _refuse_unknown_tokens(recipe, config, len(tokenizer), rows)
    require_shared(folder)
    engine = make_engine(recipe, config, parallel, device, deepspeed)
    num_steps = _num_steps(recipe, len(rows.rows))
    trainer = Trainer(recipe, parallel, engine, rows, device, num_steps)
    facts = _facts(recipe, len(rows.rows))
    progress = Progress() if start is None else checkpoints.load(start, engine, facts)
    checkpoints.require_room(*_to_write(recipe, engine, num_steps - progress.step))
    reporter: Any = SilentReporter()
    if dist.get_rank() == 0:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        reporter = Reporter(folder, num_steps, progress.step, recipe.log_every)
        reporter.say(_opening(trainer, start))
    try:
        _loop(trainer, progress, checkpoints, facts, reporter)
    finally:
        reporter.close()
    model_folder = folder / "model"
    if recipe.checkpoints.export:
        export(engine, config, tokenizer, model_folder)
    return model_folder


def _comparable(recipe: Recipe, deepspeed: str | None) -> dict[str, str]:
    """Return what must be the same on all ranks, as text."""
    file = Path(deepspeed or "")
    settings = file.read_text(errors="replace") if file.is_file() else deepspeed
    return {
        **{key: repr(value) for key, value in leaves(recipe)},
        "--deepspeed": repr(settings),
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
        "the code of Seq1F1B": digest_of_code(Path(seq1f1b.__file__).parent),
    }


def _to_write(recipe: Recipe, engine: Engine, num_steps: int) -> tuple[int, int, int]:
    """Return bytes of a checkpoint, checkpoints of ``num_steps``, and bytes of the exported model.

    A checkpoint has float32 weights and the two moments of Adam.
    """
    trained = sum(p.numel() for p in engine.model.parameters())
    saves = math.ceil(num_steps / (recipe.checkpoints.every or max(num_steps, 1)))
    return 12 * trained, saves, 4 * trained * recipe.checkpoints.export


def _refuse_unknown_tokens(recipe: Recipe, config: Any, num_tokens: int, rows: PackedRows) -> None:
    """Raise RecipeError for tokens that the model has no embedding for."""
    known = config.get_text_config().vocab_size
    if num_tokens <= known:
        return
    largest = int(rows.store.tokens.max(initial=0))
    if largest >= known:
        key = "data.tokenizer" if recipe.model.config is None else "model.config.vocab_size"
        raise RecipeError(
            f"{key}: the model knows {known} tokens, and the data has token {largest} of a "
            f"tokenizer of {num_tokens}"
        )


def _num_steps(recipe: Recipe, num_rows: int) -> int:
    settings = recipe.training
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return max(math.floor(settings.epochs * num_rows / settings.global_batch_size), 1)


def _facts(recipe: Recipe, num_rows: int) -> dict[str, Any]:
    """Return what must not change when a run goes on."""
    return {
        "training.global_batch_size": recipe.training.global_batch_size,
        "data.max_length": recipe.data.max_length,
        "seed": recipe.seed,
        "rows": num_rows,
    }


def _opening(trainer: Trainer, start: Path | None) -> str:
    recipe, parallel = trainer.recipe, trainer.parallel
    return (
        f"{dist.get_world_size()} ranks: {parallel.data_size} group(s) of {parallel.size}; "
        f"{len(trainer.rows.rows)} rows of at most {recipe.data.max_length} tokens; "
        f"{trainer.num_steps} steps of {recipe.training.global_batch_size} row(s), "
        f"{num_micro_batches(recipe, parallel)} micro-batch(es) a group"
        + (f"; from {start}" if start else "")
    )


def _loop(
    trainer: Trainer,
    progress: Progress,
    checkpoints: Checkpoints,
    facts: dict[str, Any],
    reporter: Any,
) -> None:
    every = trainer.recipe.checkpoints.every or trainer.num_steps
    for number in range(progress.step, trainer.num_steps):
        begin = time.perf_counter()
        done = trainer.step(number)
        seconds = time.perf_counter() - begin
        if not math.isfinite(done.loss) or not math.isfinite(done.grad_norm):
            raise FloatingPointError(
                f"step {number + 1}: loss {done.loss}, gradient norm {done.grad_norm}; nothing of "
                f"this step is saved. Lower training.learning_rate or raise warmup_steps"
            )
        progress = progress.after(done.num_tokens, done.num_targets)
        rate = learning_rate(trainer.recipe.training, number, trainer.num_steps)
        figures = {
            "loss": done.loss,
            "grad_norm": done.grad_norm,
            "learning_rate": rate,
            "tokens": progress.num_tokens,
            "targets": progress.num_targets,
            "seconds": seconds,
            "tokens_per_second": done.num_tokens / seconds,
        }
        reporter.step(number + 1, figures)
        if (number + 1) % every == 0 or number + 1 == trainer.num_steps:
            checkpoints.save(trainer.engine, progress, facts)
