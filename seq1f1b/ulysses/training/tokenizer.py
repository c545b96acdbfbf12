"""The tokenizer of a run; one of plain bytes needs no files."""

from typing import Any

from seq1f1b.ulysses.training.recipe import Recipe, RecipeError

BYTES = "bytes"

_CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(recipe: Recipe) -> tuple[Any, str]:
    """Return the tokenizer and a name that tells it apart. Raises RecipeError."""
    name = recipe.data.tokenizer or recipe.model.name
    if name == BYTES:
        return byte_tokenizer(), BYTES
    if name is None:
        raise RecipeError(
            "data.tokenizer: missing, and model.config has no tokenizer of its own; name a folder, "
            "one on the hub, or bytes"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        key = "data.tokenizer" if recipe.data.tokenizer else "model.name"
        raise RecipeError(f"{key}: no tokenizer {name}: {error}") from None
    return tokenizer, name


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte and three more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(("<|end|>", "<|start|>", "<|pad|>"))}
    vocabulary |= {symbol: i + len(vocabulary) for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>"],
    )
    made.chat_template = _CHAT
    return made
