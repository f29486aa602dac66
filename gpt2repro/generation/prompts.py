"""Text -> a prompt's token ids, and tokens -> text while they are made. Knows tokenizers; runs no model."""

from tokenizers.decoders import DecodeStream

from gpt2repro.data.tokenization import unknown_characters
from gpt2repro.options import InputError


def encode_prompt(tokenizer, text: str) -> list[int]:
    """A prompt's ids; an empty prompt becomes the end-of-text token, after which GPT-2 begins a new document.

    Raises: InputError for text that is no Unicode, for characters that a character tokenizer does not know, and for an
    empty prompt where the tokenizer has no token to start from.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: from "\ud800" in JSON, or a terminal that is not UTF-8
        raise InputError(f"the prompt is not valid text: character {error.start + 1} is half of one") from None
    if unknown := unknown_characters(tokenizer, text):
        raise InputError(
            f"the model's tokenizer knows no {', '.join(map(repr, unknown[:5]))}; write the prompt without, or take a "
            "model whose tokenizer is not one of characters"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # too long is said by `room_for`
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("the prompt is empty and this tokenizer has no token to start from; write a prompt")
    return [start]


def room_for(model, prompt_tokens: int) -> int | None:
    """How many tokens fit behind a prompt; None where the model sets no limit. Raises: InputError if none does."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens >= limit:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, the model sees {limit} and needs room for at least one more; "
            "shorten the prompt"
        )
    return None if limit is None else limit - prompt_tokens


class TextStream:
    """Tokens one by one -> text as soon as it is certain; never half a UTF-8 character.

    `DecodeStream` holds back tokens that end inside a character; `flush` gives them out at the end of the text.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        # A tokenizer in pure Python (few are left) has none: its text comes in one piece, with `flush`.
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.ids: list[int] = []
        self.shown = 0  # characters given out

    def push(self, token: int) -> str:
        """The characters that `token` makes certain: usually its text, sometimes none."""
        self.ids.append(token)
        text = self.stream.step(self.backend, token) or "" if self.backend else ""
        self.shown += len(text)
        return text

    def flush(self) -> str:
        """The text held back at the end: U+FFFD for a character that the tokens left unfinished."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[self.shown :]
