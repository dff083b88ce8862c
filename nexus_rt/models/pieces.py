"""A sentencepiece model (`spiece.model`) as a tokenizer of the tokenizers library: what ComfyUI's
text encoders carry inside their safetensors, as the bytes of a tensor `spiece_model`.

Only what decides the ids is read of the protobuf (sentencepiece_model.proto): pieces, scores and
types, the unknown piece and the normaliser's table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from nexus_rt.errors import ModelError

MOST_PIECES = 2_000_000
UNIGRAM = 1


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
                raise ModelError("the sentencepiece model is damaged; get the file again.")
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
            raise ModelError("the sentencepiece model is damaged; get the file again.")
        at += length
        yield key >> 3, data[at - length : at]


def _message(value: Any) -> dict[int, Any]:
    """A message inside another, by field."""
    if not isinstance(value, bytes):
        raise ModelError("the sentencepiece model is damaged; get the file again.")
    return dict(fields(value))


def tokenizer_of(data: bytes) -> Any:
    """A `tokenizers.Tokenizer` of a sentencepiece model, which ends a text with `</s>`.

    Raises:
        ModelError: damaged, or no unigram model.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary: list[tuple[str, float]] = []
    unknown, charsmap, kind = 0, b"", UNIGRAM
    for number, value in fields(data):
        if number == 1:
            piece = _message(value)
            (score,) = struct.unpack("<f", piece[2]) if 2 in piece else (0.0,)
            vocabulary.append((bytes(piece.get(1, b"")).decode("utf-8", "replace"), score))
            if piece.get(3) == 2:  # UNKNOWN
                unknown = len(vocabulary) - 1
            if len(vocabulary) > MOST_PIECES:
                raise ModelError("the sentencepiece model has more pieces than any; get it again.")
        elif number == 2:
            kind = _message(value).get(3, UNIGRAM)
        elif number == 3:
            charsmap = _message(value).get(2, b"")
    ends = [i for i, (piece, _) in enumerate(vocabulary) if piece == "</s>"]
    if kind != UNIGRAM or not ends:
        raise ModelError(
            "the sentencepiece model is not UMT5's: expected a unigram model with the piece </s>."
        )
    try:
        inner = Tokenizer(models.Unigram(vocabulary, unknown))
        steps: list[Any] = [normalizers.Precompiled(bytes(charsmap))] if charsmap else []
        steps += [
            normalizers.Strip(left=False, right=True),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
        inner.normalizer = normalizers.Sequence(steps)
    except Exception as error:  # the library raises plain exceptions on tables that are none
        raise ModelError(f"the sentencepiece model cannot be used ({error}).") from error
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ends[0])]
    )
    return inner
