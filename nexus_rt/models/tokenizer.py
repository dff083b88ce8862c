"""Tokenizers of transformers' folders: texts to token ids, one at a time, unpadded.

Where `tokenizer_config.json` names the class that is `tokenizer.json` and nothing else, the
tokenizers library reads that file alone; every other class is transformers' own, whose import takes
longer than a small clip.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.documents import MAX_BYTES, read_bytes, read_object
from nexus_rt.core.errors import ModelError, NexusError, shorten
from nexus_rt.core.process import LOADING
from nexus_rt.loading.pretrained import pretrained

# transformers' names of it: before version 5, and since
PLAIN = (
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)


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
    """`tokenizer.json`, read by the tokenizers library."""

    def __init__(self, folder: Path, config: dict[str, Any], what: str) -> None:
        import tokenizers

        self.folder, self.what = folder, what
        data = read_bytes(folder / "tokenizer.json", limit=MAX_BYTES)
        with whole(self.folder, self.what):
            self.inner = tokenizers.Tokenizer.from_buffer(data)
            self.inner.no_truncation()  # what a file says of them is its maker's last call
            self.inner.no_padding()
        self.pad_id, self.eos_id, self.unk_id = (
            self._named(config, f"{name}_token") for name in ("pad", "eos", "unk")
        )

    def _named(self, config: dict[str, Any], name: str) -> int | None:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token  # an AddedToken
        return self.token_id(token) if isinstance(token, str) else None

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        with whole(self.folder, self.what):
            if limit is None or not special:
                return self.inner.encode(text, add_special_tokens=special).ids[:limit]
            encoding = self.inner.encode(text, add_special_tokens=False)
            encoding.truncate(max(0, limit - self.inner.num_special_tokens_to_add(False)))
            return self.inner.post_process(encoding, add_special_tokens=True).ids[:limit]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)


class PieceTokenizer(PlainTokenizer):
    """The sentencepiece model inside a file of weights."""

    def __init__(self, file: Path, what: str) -> None:
        from nexus_rt.loading.stored import read_header, read_tensors
        from nexus_rt.models.pieces import tokenizer_of

        self.folder, self.what = file, what
        stored = read_header(file, integers=True).get("spiece_model")
        if stored is None or stored.dtype not in (torch.uint8, torch.int8):
            kind = "is not there" if stored is None else f"is of type {stored.dtype}"
            raise ModelError(
                f"{file}: spiece_model {kind}; expected a sentencepiece model's bytes as uint8. Get"
                f" the file again, or pass the {what}'s folder.",
                code="missing" if stored is None else "invalid_type",
            )
        ((_, data),) = read_tensors([("", stored)])
        try:
            with whole(file, what):
                self.inner = tokenizer_of(data.view(torch.uint8).flatten().numpy().tobytes())
        except ModelError as error:
            raise ModelError(f"{file}: {error}", code=error.code, param=error.param) from error
        self.pad_id, self.eos_id, self.unk_id = map(self.token_id, ("<pad>", "</s>", "<unk>"))


class TransformersTokenizer(Tokenizer):
    """Any tokenizer of transformers', by its `AutoTokenizer`."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self.inner = pretrained("AutoTokenizer", folder, what)
        with whole(folder, what):
            self.pad_id, self.eos_id = self.inner.pad_token_id, self.inner.eos_token_id
            self.unk_id = self.inner.unk_token_id

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        cutting: dict[str, Any] = {"verbose": False}
        if limit is not None:
            cutting = {"truncation": True, "max_length": limit}
        with whole(self.folder, self.what):
            return self.inner(text, add_special_tokens=special, **cutting).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        with whole(self.folder, self.what):
            token_id = self.inner.convert_tokens_to_ids(token)
            unknown = token_id == self.unk_id and token != self.inner.unk_token
        return None if token_id is None or unknown else token_id


def load_tokenizer(folder: Path, what: str) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer_config.json`, or of a file of weights that carries
    one; `what` names its part in errors.

    Raises:
        ModelError: a damaged folder.
    """
    if folder.is_file():
        return PieceTokenizer(folder, what)
    path = folder / "tokenizer_config.json"
    config = read_object(path) if path.is_file() else {}
    # of earlier folders, where the special tokens are not in the config
    special = folder / "special_tokens_map.json"
    config = {**(read_object(special) if special.is_file() else {}), **config}
    with LOADING:
        if config.get("tokenizer_class") in PLAIN and (folder / "tokenizer.json").is_file():
            return PlainTokenizer(folder, config, what)
        return TransformersTokenizer(folder, what)
