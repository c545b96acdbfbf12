"""``--tokenizer-type GPT2BPETokenizer --vocab-file V --merge-file M`` without a network.

Megatron-Core 0.19 asks the Hugging Face hub for ``gpt2`` even when both files are given.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron.adaptor.patches import Patch

_TOKENIZER = (
    "megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer:MegatronHFTokenizer.__init__"
)


def patches() -> list[Patch]:
    """Return what is replaced in Megatron's tokenizers."""
    return [Patch(_TOKENIZER, gpt2_from_files)]


def gpt2_from_files(
    original: Callable[..., None],
    tokenizer: Any,
    tokenizer_path: str,
    vocab_file: str | None = None,
    merges_file: str | None = None,
    **kwargs: Any,
) -> None:
    """Read GPT-2's two tokenizer files without asking the hub."""
    if tokenizer_path != "GPT2BPETokenizer" or not (vocab_file and merges_file):
        original(tokenizer, tokenizer_path, vocab_file, merges_file, **kwargs)
        return
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(vocab_file, folder / "vocab.json")
        shutil.copy(merges_file, folder / "merges.txt")
        config = {"tokenizer_class": "GPT2Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        HuggingFaceTokenizer.__init__(tokenizer, name, **kwargs)
