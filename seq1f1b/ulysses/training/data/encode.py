"""From records to tokens, and which of them are learned."""

from dataclasses import dataclass
from typing import Any

from seq1f1b.ulysses.training.data.records import DataError, Record
from seq1f1b.ulysses.training.recipe import DataSettings


@dataclass(frozen=True)
class Document:
    """Tokens, and for each whether it is learned (predicted by the one before)."""

    tokens: list[int]
    learned: list[bool]


class Encoder:
    """Encodes records in the format that the recipe names, or that their keys show."""

    def __init__(self, settings: DataSettings, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._end = tokenizer.eos_token_id
        if self._end is None:
            raise DataError("the tokenizer has no end-of-sequence token, which ends a document")

    def encode(self, record: Record) -> Document:
        """Return one document. Raises DataError that names the record."""
        match self._format(record):
            case "text":
                tokens = self._tokens(self._text(record, self.settings.text_key)) + [self._end]
                return Document(tokens, [True] * len(tokens))
            case "prompt":
                prompt = self._tokens(self._text(record, self.settings.prompt_key))
                answer = self._tokens(self._text(record, self.settings.answer_key), more=True)
                answer.append(self._end)
                return Document(prompt + answer, [False] * len(prompt) + [True] * len(answer))
            case _:
                return self._conversation(record)

    def _format(self, record: Record) -> str:
        settings, keys = self.settings, record.content.keys()
        if settings.format != "auto":
            return settings.format
        if settings.messages_key in keys:
            return "messages"
        if settings.prompt_key in keys and settings.answer_key in keys:
            return "prompt"
        if settings.text_key in keys:
            return "text"
        raise DataError(
            f"{record.place}: has {', '.join(sorted(keys))}, and neither {settings.text_key} nor "
            f"{settings.messages_key} nor {settings.prompt_key} and {settings.answer_key}; set "
            f"data.text_key, data.messages_key, or data.prompt_key and data.answer_key"
        )

    def _text(self, record: Record, key: str) -> str:
        text = record.content.get(key)
        if not isinstance(text, str):
            raise DataError(f"{record.place}: {key} must be text, not {type(text).__name__}")
        _check_encodable(text, record, key)
        return text

    def _tokens(self, text: str, *, more: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not more)["input_ids"])

    def _conversation(self, record: Record) -> Document:
        messages = record.content.get(self.settings.messages_key)
        is_list = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not is_list or not messages:
            raise DataError(f"{record.place}: {self.settings.messages_key} must be a list of turns")
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{record.place}: the tokenizer has no chat template to write conversations with"
            )
        self._check_turns(record, messages)
        tokens: list[int] = []
        learned: list[bool] = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            asked = self._rendered(record, messages[:index], prompts=True)
            answered = self._rendered(record, messages[: index + 1])
            if asked[: len(tokens)] != tokens or answered[: len(asked)] != asked:
                raise DataError(f"{record.place}: {_NOT_A_PREFIX}")
            learned += [False] * (len(asked) - len(tokens)) + [True] * (len(answered) - len(asked))
            tokens = answered
        if not tokens:
            raise DataError(f"{record.place}: the assistant says nothing that could be learned")
        return Document(tokens, learned)

    def _check_turns(self, record: Record, messages: list[dict[str, Any]]) -> None:
        """Raise DataError for turns that templates write as nothing, or as Python writes them."""
        for number, message in enumerate(messages, start=1):
            key, text = f"turn {number} of {self.settings.messages_key}", message.get("content")
            if isinstance(text, str):
                _check_encodable(text, record, key)
            elif text is not None or not message.get("tool_calls"):
                raise DataError(
                    f"{record.place}: {key} must have text as content, not {type(text).__name__}"
                )
        if messages[0].get("role") == "assistant":
            raise DataError(
                f"{record.place}: the conversation begins with the assistant, and chat templates "
                f"need a turn before: add one of the system or the user"
            )

    def _rendered(
        self, record: Record, messages: list[dict[str, Any]], *, prompts: bool = False
    ) -> list[int]:
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=prompts, return_dict=True
                )["input_ids"]
            )
        except Exception as error:
            raise DataError(f"{record.place}: the chat template refuses it: {error}") from None


def _check_encodable(text: str, record: Record, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.place}: {key} holds half a surrogate pair at character {error.start}"
        ) from None


_NOT_A_PREFIX = (
    "the chat template changes earlier turns when later ones follow, so that it cannot be told "
    "what the assistant says; use data.format prompt, with prompt and answer written out"
)
