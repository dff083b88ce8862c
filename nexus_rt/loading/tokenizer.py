"""A tokenizer's folder, or a file of weights that carries one, to a tokenizer.

Where `tokenizer_config.json` names the class that is `tokenizer.json` and nothing else, the
tokenizers library reads that file alone; every other class is transformers' own, whose import takes
longer than a small clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.documents import MAX_BYTES, read_bytes
from nexus_rt.core.errors import ModelError
from nexus_rt.core.process import LOADING
from nexus_rt.loading.config import read_optional
from nexus_rt.loading.formats.safetensors import read_header
from nexus_rt.loading.formats.stored import read_tensor
from nexus_rt.loading.pretrained import pretrained
from nexus_rt.models.tokenizer import PlainTokenizer, Tokenizer, TransformersTokenizer, whole

# transformers' names of it: before version 5, and since
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: Path, what: str) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer_config.json`, or of a file of weights that carries
    one; `what` names its part in errors.

    Raises:
        ModelError: a damaged folder.
    """
    if folder.is_file():
        return _of_pieces(folder, what)
    # of earlier folders, where the special tokens are not in the config
    special = read_optional(folder / "special_tokens_map.json")
    config = {**special, **read_optional(folder / "tokenizer_config.json")}
    with LOADING:
        if config.get("tokenizer_class") in PLAIN and (folder / "tokenizer.json").is_file():
            return _of_json(folder, config, what)
        return of_transformers(folder, what)


def _of_json(folder: Path, config: dict[str, Any], what: str) -> PlainTokenizer:
    """By `tokenizer.json`."""
    import tokenizers

    data = read_bytes(folder / "tokenizer.json", limit=MAX_BYTES)
    with whole(folder, what):
        inner = tokenizers.Tokenizer.from_buffer(data)
        inner.no_truncation()  # what a file says of them is its maker's last call
        inner.no_padding()
    return PlainTokenizer(
        inner, (_token(config, "pad"), _token(config, "eos"), _token(config, "unk")), folder, what
    )


def _token(config: dict[str, Any], name: str) -> str | None:
    """A special token of a config."""
    token = config.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token  # an AddedToken
    return token if isinstance(token, str) else None


def _of_pieces(file: Path, what: str) -> PlainTokenizer:
    """By the sentencepiece model inside a file of weights."""
    from nexus_rt.models.pieces import tokenizer_of

    stored = read_header(file, integers=True).get("spiece_model")
    if stored is None or stored.dtype not in (torch.uint8, torch.int8):
        kind = "is not there" if stored is None else f"is of type {stored.dtype}"
        raise ModelError(
            f"{file}: spiece_model {kind}; expected a sentencepiece model's bytes as uint8. Get"
            f" the file again, or pass the {what}'s folder.",
            code="missing" if stored is None else "invalid_type",
        )
    data = read_tensor(stored).view(torch.uint8).flatten().numpy().tobytes()
    try:
        with whole(file, what):
            inner = tokenizer_of(data)
    except ModelError as error:
        raise ModelError(f"{file}: {error}", code=error.code, param=error.param) from error
    return PlainTokenizer(inner, ("<pad>", "</s>", "<unk>"), file, what)


def of_transformers(folder: Path, what: str) -> TransformersTokenizer:
    """By transformers' `AutoTokenizer`."""
    return TransformersTokenizer(pretrained("AutoTokenizer", folder, what), folder, what)
