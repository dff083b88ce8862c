"""Tokenizers: texts to token ids, one at a time, unpadded. Two libraries behind one interface."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexus_rt.core.errors import ModelError, NexusError, shorten


class Tokenizer(ABC):
    """Texts to token ids and back."""

    pad_id: int | None
    eos_id: int | None
    unk_id: int | None

    @abstractmethod
    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer adds where `special`; cut to
        `limit`, those included."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of one token, None where the vocabulary lacks it."""


@contextlib.contextmanager
def whole(folder: Path, what: str) -> Iterator[None]:
    """A `ModelError` for what the libraries raise on files whose parts do not fit each other, some
    when they are read and some when a text is: bare Exceptions, and panics, which are none."""
    try:
        yield
    except NexusError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(
                f"{folder}: the {what} cannot be loaded ({shorten(error)}); download it again."
            ) from error
        raise


class PlainTokenizer(Tokenizer):
    """Of the tokenizers library.

    Args:
        inner: a `tokenizers.Tokenizer`.
        special: its padding, end and unknown token, None where it has none.
        where, what: its file and its part, for errors.
    """

    def __init__(
        self, inner: Any, special: tuple[str | None, str | None, str | None], where: Path, what: str
    ) -> None:
        self.inner, self.where, self.what = inner, where, what
        self.pad_id, self.eos_id, self.unk_id = (
            None if token is None else self.token_id(token) for token in special
        )

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        with whole(self.where, self.what):
            if limit is None or not special:
                return self.inner.encode(text, add_special_tokens=special).ids[:limit]
            encoding = self.inner.encode(text, add_special_tokens=False)
            encoding.truncate(max(0, limit - self.inner.num_special_tokens_to_add(False)))
            return self.inner.post_process(encoding, add_special_tokens=True).ids[:limit]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)


class TransformersTokenizer(Tokenizer):
    """Any tokenizer of transformers'; arguments as of `PlainTokenizer`."""

    def __init__(self, inner: Any, where: Path, what: str) -> None:
        self.inner, self.where, self.what = inner, where, what
        with whole(where, what):
            self.pad_id, self.eos_id = inner.pad_token_id, inner.eos_token_id
            self.unk_id = inner.unk_token_id

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        cutting: dict[str, Any] = {"verbose": False}
        if limit is not None:
            cutting = {"truncation": True, "max_length": limit}
        with whole(self.where, self.what):
            return self.inner(text, add_special_tokens=special, **cutting).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        with whole(self.where, self.what):
            token_id = self.inner.convert_tokens_to_ids(token)
            unknown = token_id == self.unk_id and token != self.inner.unk_token
        return None if token_id is None or unknown else token_id
