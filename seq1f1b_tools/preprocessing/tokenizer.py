"""The tokenizer that `--tokenizer-type` asks for, with as few imports as it needs.

GPT2BPETokenizer and HuggingFaceTokenizer run in Rust and import neither torch nor Megatron. All
others, and these two's rarer flags, go through Megatron's own builder.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from seq1f1b_tools.preprocessing.bpe import END_OF_DOCUMENT, load_gpt2_bpe
from seq1f1b_tools.preprocessing.errors import SettingError

_PROBES = ("", "a", " def f(x):\n\treturn x  # 1.5\n", "<s> </s> é漢🙂 [SEP] <|endoftext|>")


@dataclass(frozen=True)
class BatchTokenizer:
    """A tokenizer as preprocessing needs it.

    Attributes:
        encode: texts to the ids of each.
        vocab_size: number of tokens, from which follows how they are stored.
        eod: id of the end-of-document token, or None where the tokenizer has none.
        is_threaded: `encode` works on many texts at once, in threads of its own.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    vocab_size: int
    eod: int | None
    is_threaded: bool


def load_tokenizer(args: argparse.Namespace, other_flags: Sequence[str]) -> BatchTokenizer:
    """Load the tokenizer that the flags name.

    Args:
        args: has tokenizer_type, tokenizer_model, vocab_file and merge_file.
        other_flags: what the tool itself does not know, meant for Megatron's tokenizer builder.

    Raises:
        SettingError: the tokenizer is unknown or cannot be loaded; the message names the flag.
    """
    if "--trust-remote-code" in other_flags:
        raise SettingError(
            "--trust-remote-code: code that comes with a tokenizer is not run here; store the "
            "tokenizer as tokenizer.json (save_pretrained of transformers), which needs none"
        )
    if args.tokenizer_type == "GPT2BPETokenizer":
        return _load_gpt2(args, other_flags)
    if args.tokenizer_type == "HuggingFaceTokenizer" and not other_flags:
        return _load_hugging_face(args)
    return _load_megatron(args, other_flags)


def _rust_encode(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]


def _load_gpt2(args: argparse.Namespace, other_flags: Sequence[str]) -> BatchTokenizer:
    if other_flags:
        raise SettingError(f"not known, or not with GPT2BPETokenizer: {' '.join(other_flags)}")
    for flag, value in (("--vocab-file", args.vocab_file), ("--merge-file", args.merge_file)):
        if value is None:
            raise SettingError(f"--tokenizer-type GPT2BPETokenizer needs {flag}")
    tokenizer = load_gpt2_bpe(args.vocab_file, args.merge_file)
    return BatchTokenizer(
        encode=_rust_encode(tokenizer),
        vocab_size=tokenizer.get_vocab_size(),
        eod=tokenizer.token_to_id(END_OF_DOCUMENT),
        is_threaded=True,
    )


def _load_hugging_face(args: argparse.Namespace) -> BatchTokenizer:
    model = args.tokenizer_model
    if model is None:
        raise SettingError("--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model")
    looks_like_path = model.startswith(("/", ".")) or model.count("/") > 1
    if looks_like_path and not os.path.exists(model):
        raise SettingError(f"--tokenizer-model {model}: no such folder")
    files = {"vocab_file": args.vocab_file, "merges_file": args.merge_file}
    given = {name: path for name, path in files.items() if path is not None}
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with _torch_hidden():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                model, use_fast=True, trust_remote_code=False, **given
            )
    except Exception as error:  # transformers and the hub raise classes of every kind
        raise SettingError(f"--tokenizer-model {model}: cannot be loaded: {error}") from error
    _add_megatron_roles(tokenizer)
    encode, is_threaded = _hugging_face_encode(tokenizer)
    return BatchTokenizer(encode, len(tokenizer), tokenizer.eos_token_id, is_threaded)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Keep transformers from importing torch: tokenizers need none of it, and it takes seconds."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment] # Python's mark for "not there"
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def _add_megatron_roles(tokenizer: Any) -> None:
    """Let one token of a pair stand in for the other where that is missing, as Megatron does."""
    stand_ins = {}
    for first, second in (("sep_token", "eos_token"), ("bos_token", "cls_token")):
        values = getattr(tokenizer, first, None), getattr(tokenizer, second, None)
        if values[0] is None and values[1]:
            stand_ins[first] = values[1]
        elif values[1] is None and values[0]:
            stand_ins[second] = values[0]
    tokenizer.add_special_tokens(stand_ins)


def _hugging_face_encode(tokenizer: Any) -> tuple[Callable[..., list[list[int]]], bool]:
    """The batch encoder, and whether it is the Rust one.

    A class in Python may add to what its Rust part does; then, and where there is no Rust part,
    the class itself is called.
    """

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer(text).input_ids for text in texts]

    rust = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if rust is None:
        return encode, False
    expected = encode(_PROBES)
    rust.no_truncation()
    rust.no_padding()
    if [rust.encode(text).ids for text in _PROBES] != expected:
        return encode, False
    return _rust_encode(rust), True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Megatron's remarks on parts of it that have no say here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _load_megatron(args: argparse.Namespace, other_flags: Sequence[str]) -> BatchTokenizer:
    with _quiet():
        from megatron.core.tokenizers.utils.build_tokenizer import (
            SUPPORTED_TOKENIZERS,
            build_tokenizer,
        )

        if args.tokenizer_type not in SUPPORTED_TOKENIZERS:
            raise SettingError(
                f"--tokenizer-type {args.tokenizer_type}: not known. Megatron has "
                + ", ".join(sorted(SUPPORTED_TOKENIZERS))
            )
        settings = _megatron_settings(args, other_flags)
        try:
            tokenizer = build_tokenizer(settings)
            vocab_size, eod = tokenizer.vocab_size, _eod_or_none(tokenizer)
        except Exception as error:  # each tokenizer library raises its own
            raise SettingError(
                f"--tokenizer-type {args.tokenizer_type}: cannot be loaded: {error}"
            ) from error
    return BatchTokenizer(
        encode=lambda texts: [list(tokenizer.tokenize(text)) for text in texts],
        vocab_size=vocab_size,
        eod=eod,
        is_threaded=False,
    )


def _megatron_settings(args: argparse.Namespace, other_flags: Sequence[str]) -> argparse.Namespace:
    from megatron.training.arguments import _add_tokenizer_args

    flags = ["--tokenizer-type", args.tokenizer_type, *other_flags]
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        value = getattr(args, name)
        flags += [f"--{name.replace('_', '-')}", value] if value is not None else []
    parser = argparse.ArgumentParser("preprocess_data.py", allow_abbrev=False)
    settings = _add_tokenizer_args(parser).parse_args(flags)
    # what the builder reads besides; the padding that it works out from these is not used here
    settings.rank = 1
    settings.make_vocab_size_divisible_by = 128
    settings.tensor_model_parallel_size = 1
    settings.sft_tokenizer_prompt_format = None
    return settings


def _eod_or_none(tokenizer: Any) -> int | None:
    try:
        return tokenizer.eod
    except (AttributeError, NotImplementedError):
        return None
