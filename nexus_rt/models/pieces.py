"""A sentencepiece model (`spiece.model`) as a tokenizer of the tokenizers library: what ComfyUI's
text encoders carry inside their safetensors, as the bytes of a tensor `spiece_model`.

Only what decides the ids is read of the protobuf (sentencepiece_model.proto): pieces, scores and
types, the unknown piece and the normaliser's table.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from nexus_rt.core.errors import ModelError, shorten

MAX_PIECES = 2_000_000
MAX_BYTES = 64 * 2**20  # of a model: UMT5's has 4.5 million
UNIGRAM, UNKNOWN = 1, 2
DAMAGED = "the sentencepiece model is damaged; get the file again."


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: whole numbers, or bytes.

    Raises:
        ModelError: it is none.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ModelError(DAMAGED, code="damaged")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or at + length > len(data):
            raise ModelError(DAMAGED, code="damaged")
        at += length
        yield key >> 3, data[at - length : at]


def _message(value: Any) -> dict[int, Any]:
    """A message inside another, by field."""
    return dict(fields(_bytes(value)))


def _bytes(value: Any, size: int | None = None) -> bytes:
    """A field's bytes, `size` of them: a number there would be a length to allocate.

    Raises:
        ModelError: it is a number, or of another size.
    """
    if not isinstance(value, bytes) or size not in (None, len(value)):
        raise ModelError(DAMAGED, code="damaged")
    return value


def _piece(value: Any) -> tuple[str, float, bool]:
    """A piece of the vocabulary: its text, its score, and whether it stands for unknown text."""
    piece = _message(value)
    (score,) = struct.unpack("<f", _bytes(piece.get(2, b"\0\0\0\0"), 4))
    if not math.isfinite(score):
        raise ModelError(DAMAGED, code="damaged")
    return _bytes(piece.get(1, b"")).decode("utf-8", "replace"), score, piece.get(3) == UNKNOWN


def check_table(table: bytes) -> None:
    """Raise where a normaliser's table would be read beyond its end, which ends in the library's
    panic and a stack trace of its own.

    table: the trie's size in bytes, a darts-clone double array, and its texts, each ended by NUL.
    """
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or not size or size % 4 or 4 + size > len(table):
        raise ModelError(DAMAGED, code="damaged")
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(table, np.uint8, offset=4 + size)
    offsets = (units >> 10) << ((units & 512) >> 6)
    labels, leaves = units & (2**31 | 255), (units & 256) != 0
    seen = np.zeros(len(units), dtype=bool)
    nodes = offsets[:1]
    while len(nodes):
        if int(nodes.max()) | 255 >= len(units):
            raise ModelError(DAMAGED, code="damaged")
        seen[nodes] = True
        places = nodes[:, None] ^ np.arange(1, 256)  # of every byte that may come next
        places = places[labels[places] == np.arange(1, 256)]
        nodes = places ^ offsets[places]
        if len(nodes) and int(nodes.max()) >= len(units):
            raise ModelError(DAMAGED, code="damaged")
        starts = units[nodes[leaves[places]]] & (2**31 - 1)
        if len(starts) and int(starts.max()) > len(texts):
            raise ModelError(DAMAGED, code="damaged")
        starts = starts[starts < len(texts)]
        if ((texts[starts] & 0xC0) == 0x80).any():  # inside a character
            raise ModelError(DAMAGED, code="damaged")
        nodes = np.unique(nodes[~seen[nodes]])


def tokenizer_of(data: bytes) -> Any:
    """A `tokenizers.Tokenizer` of a sentencepiece model, which ends a text with `</s>`.

    Raises:
        ModelError: damaged, or no unigram model.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    if len(data) > MAX_BYTES:
        raise ModelError(
            f"the sentencepiece model has {len(data)} bytes; expected at most {MAX_BYTES}: it is"
            " something else.",
            code="too_large",
        )
    vocabulary: list[tuple[str, float]] = []
    unknown, charsmap, kind = None, b"", UNIGRAM
    for number, value in fields(data):
        if number == 1:
            text, score, is_unknown = _piece(value)
            vocabulary.append((text, score))
            if is_unknown:
                unknown = len(vocabulary) - 1
            if len(vocabulary) > MAX_PIECES:
                raise ModelError(
                    "the sentencepiece model has more pieces than any; get it again.",
                    code="too_large",
                )
        elif number == 2:
            kind = _message(value).get(3, UNIGRAM)
        elif number == 3:
            charsmap = _bytes(_message(value).get(2, b""))
    ends = [i for i, (piece, _) in enumerate(vocabulary) if piece == "</s>"]
    if kind != UNIGRAM or not ends or unknown is None:
        raise ModelError(
            "the sentencepiece model is not UMT5's: expected a unigram model with the piece </s>"
            " and one for unknown text.",
            code="unsupported",
        )
    if charsmap:
        check_table(charsmap)
    try:
        inner = Tokenizer(models.Unigram(vocabulary, unknown))
        steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
        steps += [
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
        inner.normalizer = normalizers.Sequence(steps)
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", ends[0])]
        )
    except Exception as error:  # the library raises plain exceptions on tables that are none
        raise ModelError(f"the sentencepiece model cannot be used ({shorten(error)}).") from error
    return inner
