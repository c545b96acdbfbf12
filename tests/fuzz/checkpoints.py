"""Cases for the converter: damaged models and checkpoints, both ways."""

import json
import random
import re
from pathlib import Path

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from seq1f1b_tools.checkpoint.convert import app
from tests.fuzz.mutate import TEXTS, copy, damage_folder
from tests.fuzz.watch import Ended, call, expect
from tests.seq1f1b_tools.checkpoint.tiny_models import make

_MODELS = ("llama", "qwen2", "mixtral", "deepseek_v3", "llama, biases of attention")
_FLAG = re.compile(
    r"--[a-z0-9-]+|\d+(\.\d+)?(e[+-]?\d+)?|rope|yarn|RMSNorm|softmax|sigmoid|alltoall|fp32"
    r"|\[[01](,[01])*\]"
)


def _convert(*arguments: object) -> Ended:
    command = typer.main.get_command(app)
    return call(lambda: command.main([str(a) for a in arguments], prog_name="convert"))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Read a folder as transformers does."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = json.loads(index.read_text())["weight_map"]
        files = {file: load_file(folder / file) for file in set(named.values())}
        return {name: files[file][name] for name, file in named.items()}
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if shards := sorted(folder.glob("*.safetensors")):
        return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def _check_message(run: Ended) -> None:
    expect(run.status == 2, f"ends with {run.status!r}: {run.err[-500:]}")
    place = run.err.rfind("error: ")
    if place < 0:  # of the command line itself
        expect("Usage:" in run.err, f"says nothing: {run.err[-500:]}")
    else:
        message = run.err[place:].strip()
        expect(message.count("\n") == 0, f"more than one line: {message}")
        expect(len(message) < 2500, f"too long: {message[:300]}")


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.double()
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


class HfToMegatron:
    """A model's folder with up to two damages."""

    def __init__(self, base: Path) -> None:
        self.folders: dict[str, Path] = {}
        for number, name in enumerate(_MODELS):
            folder = base / f"model{number}"
            make(name, folder)
            self.folders[name] = folder
        pickled = copy(self.folders["llama"], base / "pickled")
        tensors = _tensors(pickled)
        for file in pickled.glob("*.safetensors*"):
            file.unlink()
        torch.save(tensors, pickled / "pytorch_model.bin")
        single = copy(self.folders["qwen2"], base / "single")
        tensors = {name: tensor.clone() for name, tensor in _tensors(single).items()}
        for file in single.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
        self.folders |= {"pickled": pickled, "single": single}

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Convert, and what is converted back again."""
        source = copy(dice.choice(list(self.folders.values())), folder / "hf")
        for _ in range(dice.choice((0, 1, 1, 1, 2))):
            damage_folder(dice, source)
        flags = []
        if dice.random() < 0.2:
            flags += ["--dtype", dice.choice(("float32", "bfloat16", "float16", *TEXTS))]
        if dice.random() < 0.1:
            flags += ["--tensor-parallel", dice.choice(("1", "2", "3", "64", *TEXTS))]
        if dice.random() < 0.1:
            flags += ["--drop-mtp"]
        output = folder / "out"
        run = _convert("hf-to-megatron", "--hf", source, "--output", output, *flags)
        if run.status != 0:
            _check_message(run)
            expect(not list(folder.glob("out*")), "something is left")
            return False
        words = (output / "megatron_flags.txt").read_text().splitlines()
        expect(run.out.splitlines() == words, "prints other flags than it stores")
        strange = [word for word in words if not _FLAG.fullmatch(word)]
        expect(not strange, f"strange flags: {strange}")
        back = _convert(
            *("megatron-to-hf", "--megatron", output, "--hf-config", source),
            *("--output", folder / "back"),
        )
        expect(back.status == 0, f"cannot be converted back: {back.err[-500:]}")
        dtype = flags[1] if flags[:1] == ["--dtype"] else None
        self._compare(_tensors(folder / "back"), _tensors(source), dtype)
        return True

    def _compare(
        self, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str | None
    ) -> None:
        if "lm_head.weight" not in found:
            expected.pop("lm_head.weight", None)
        expected = {k: v for k, v in expected.items() if not k.endswith("rotary_emb.inv_freq")}
        expect(found.keys() == expected.keys(), f"names: {found.keys() ^ expected.keys()}")
        for name, tensor in expected.items():
            if dtype is not None and "correction_bias" not in name:
                tensor = tensor.to(getattr(torch, dtype))
            expect(_same(found[name], tensor), f"{name} is another tensor")


class MegatronToHf:
    """A checkpoint or a config.json with up to two damages."""

    def __init__(self, base: Path) -> None:
        self.pairs: list[tuple[Path, Path]] = []
        for number, name in enumerate(_MODELS):
            folder, checkpoint = base / f"config{number}", base / f"checkpoint{number}"
            make(name, folder)
            done = _convert("hf-to-megatron", "--hf", folder, "--output", checkpoint)
            assert done.status == 0, done.err
            self.pairs.append((folder, checkpoint))

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Convert, and compare with the tensors that the checkpoint was made of."""
        original, stored = dice.choice(self.pairs)
        source, checkpoint = copy(original, folder / "hf"), copy(stored, folder / "megatron")
        for file in source.glob("*.safetensors*"):
            file.unlink()
        damaged = checkpoint if dice.random() < 0.75 else source
        for _ in range(dice.choice((0, 1, 1, 1, 2))):
            damage_folder(dice, damaged)
        flags = ["--dtype", "bfloat16"] if dice.random() < 0.1 else []
        if dice.random() < 0.1:
            flags += ["--max-shard-gib", dice.choice(("0.001", "1", *TEXTS))]
        output = folder / "out"
        run = _convert(
            *("megatron-to-hf", "--megatron", checkpoint, "--hf-config", source),
            *("--output", output, *flags),
        )
        if run.status != 0:
            _check_message(run)
            expect(not list(folder.glob("out*")), "something is left")
            return False
        found, expected = _tensors(output), _tensors(original)
        rows = json.loads((source / "config.json").read_text()).get("vocab_size")
        expect(found.keys() == expected.keys(), f"names: {found.keys() ^ expected.keys()}")
        for name, tensor in expected.items():
            if name in ("lm_head.weight", "model.embed_tokens.weight") and isinstance(rows, int):
                tensor = tensor[:rows]
            if "--dtype" in flags and "correction_bias" not in name:
                tensor = tensor.bfloat16()
            expect(_same(found[name], tensor), f"{name} is another tensor")
        return True
