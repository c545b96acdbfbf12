"""GPT-2's byte-level BPE: from its two files, or trained on texts, always offline."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from seq1f1b_tools.preprocessing.errors import SettingError

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _mark_end_of_document(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, normalized=False, special=True)])
    return tokenizer


def load_gpt2_bpe(vocab_file: str, merge_file: str) -> Tokenizer:
    """GPT-2's tokenizer with the given vocabulary and merges.

    As in Hugging Face's GPT-2 tokenizer, the text `<|endoftext|>` inside a document becomes the
    one end-of-document token.

    Raises:
        SettingError: a file is missing or is not what its flag asks for.
    """
    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not os.path.isfile(path):
            raise SettingError(f"{flag} {path}: no such file")
    try:
        with open(vocab_file, encoding="utf-8") as file:
            vocab = json.load(file)
    except (OSError, ValueError) as error:
        raise SettingError(f"--vocab-file {vocab_file}: not a JSON vocabulary: {error}") from error
    if not isinstance(vocab, dict) or END_OF_DOCUMENT not in vocab:
        raise SettingError(
            f"--vocab-file {vocab_file}: not GPT-2's kind of vocabulary (token to id), "
            f"or without the token {END_OF_DOCUMENT}"
        )
    try:
        model = models.BPE.from_file(vocab_file, merge_file)
    except Exception as error:  # the Rust side raises no narrower class
        raise SettingError(
            f"--merge-file {merge_file}: does not go with --vocab-file {vocab_file}: {error}"
        ) from error
    return _mark_end_of_document(_byte_level(model))


def train_bpe(texts: Iterable[str], vocab_size: int, num_texts: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens; `num_texts` sizes its progress bar."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer, length=num_texts)
    return _mark_end_of_document(tokenizer)


def save_tokenizer_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write GPT-2's vocab.json and merges.txt, and what makes the folder a Hugging Face tokenizer.

    Its ids are the same through `--vocab-file` with `--merge-file` and through `--tokenizer-model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "unk_token": END_OF_DOCUMENT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
