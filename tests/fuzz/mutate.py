"""Damages: of bytes, of JSON, of text, and of folders."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DEEP: Any = []
for _ in range(500):
    _DEEP = [_DEEP]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 2.5, 1e-6, 1e400, -1e400, float("nan"), 10**30, 10**400,
    2**31, 2**63, "", "x", "1", "1e-6 --load /x", "[/x]", "[bold]", "../../x", "/etc/passwd",
    "\ud800", "\0", "ü" * 50, "x" * 5000, [], [1], [[]], {}, {"a": 1}, {"rope_type": "yarn"}, _DEEP,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "1", "2", "3 4", "1,2", "1.5", "1e400", "inf", "nan", "9" * 30, "9" * 5000,
    "x", "²", "ü", "[/x]", "~nosuchuser/x", "~", "../x", "--", "'", '"', "$(touch x)", "`touch x`",
    ";touch x", "\t", "1\n2", "all", "None", "True", "/dev/null", "/dev/full", "tiny", "average",
)  # fmt: skip


def some_bytes(dice: random.Random, content: bytes) -> bytes:
    """Return ``content`` with one damage."""
    if not content:
        return dice.randbytes(dice.randrange(1, 40))
    place = dice.randrange(len(content))
    size = min(dice.choice((1, 2, 8, 100, 4096)), len(content) - place)
    damage = dice.randrange(9)
    if damage == 0:
        flipped = content[place] ^ (1 << dice.randrange(8))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if damage == 1:
        return content[:place]
    if damage == 2:
        return content + dice.randbytes(size)
    if damage == 3:
        return content[:place] + bytes(size) + content[place + size :]
    if damage == 4:
        return content[:place] + dice.randbytes(size) + content[place + size :]
    if damage == 5:
        return content[:place] + content[place + size :]
    if damage == 6:
        return content[:place] + content[place : place + size] * 2 + content[place + size :]
    if damage == 7:
        return dice.choice((b"", b"null", b"{}", b"[]", b"[" * 20_000, b"\xff\xfe", b"\x80\x04N."))
    return dice.randbytes(len(content) % 5000)


def some_json(dice: random.Random, value: Any) -> Any:
    """Return JSON with one entry removed, renamed, doubled or set to something else."""
    places = list(_places(value))
    if not places:
        return dice.choice(VALUES)
    holder, key = dice.choice(places)
    damage = dice.randrange(5)
    if damage == 0:
        del holder[key]
    elif damage == 1 and isinstance(holder, dict):
        holder[dice.choice(("x", "", "../x", str(key) + "_", "quantization_config"))] = holder.pop(
            key
        )
    elif damage == 2:
        other, other_key = dice.choice(places)
        try:
            holder[key] = other[other_key]
        except (KeyError, IndexError):
            holder[key] = None
    else:
        holder[key] = dice.choice(VALUES)
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for key in range(len(value)):
            yield value, key
            yield from _places(value[key])


def write_json(file: Path, value: Any) -> None:
    """Write JSON, with numbers and signs that no sound program writes."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = "[" * 2000
    file.write_text(text, errors="surrogatepass")


def damage_file(dice: random.Random, file: Path) -> None:
    """Damage a file of any kind; JSON half of the time as JSON."""
    content = file.read_bytes()
    if file.suffix == ".json" and dice.random() < 0.6:
        try:
            write_json(file, some_json(dice, json.loads(content)))
            return
        except (ValueError, RecursionError):
            pass
    if file.suffix == ".jsonl" and dice.random() < 0.6:
        lines = content.splitlines()
        if lines:
            place = dice.randrange(len(lines))
            try:
                entry = some_json(dice, json.loads(lines[place]))
                lines[place] = json.dumps(entry).encode(errors="surrogatepass")
                file.write_bytes(b"\n".join(lines) + b"\n")
                return
            except (ValueError, RecursionError):
                pass
    file.write_bytes(some_bytes(dice, content))


def _remove(dice: random.Random, file: Path) -> None:
    file.unlink()


def _to_folder(dice: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def _to_loop(dice: random.Random, file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _to_dangling_link(dice: random.Random, file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def _to_pipe(dice: random.Random, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _copy_beside(dice: random.Random, file: Path) -> None:
    other = file.with_name(dice.choice(("zzz", "aaa", "0")) + file.suffix)
    if not other.exists():
        other.write_bytes(some_bytes(dice, file.read_bytes()))


def damage_folder(dice: random.Random, folder: Path, *, pipes: bool = False) -> None:
    """Damage one file of a folder, or replace it by something else."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        return
    file = dice.choice(files)
    others: tuple[Callable[[random.Random, Path], None], ...] = (
        *(_remove, _to_folder, _to_loop, _to_dangling_link, _copy_beside),
        *((_to_pipe,) if pipes else ()),
    )
    if dice.random() < 0.8:
        damage_file(dice, file)
    else:
        dice.choice(others)(dice, file)


def copy(source: Path, target: Path) -> Path:
    """Copy a folder, links as what they lead to."""
    return Path(shutil.copytree(source, target))
