"""Prompts to UMT5 embeddings, as diffusers' WanPipeline makes them."""

from __future__ import annotations

import html
import re
import warnings
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.limits import MAX_SEQUENCE_LENGTH
from nexus_rt.core.tracing import span
from nexus_rt.loading.locate import find_text
from nexus_rt.loading.source import folder_bytes
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.tokenizer import Tokenizer, load_tokenizer
from nexus_rt.models.umt5 import load_umt5


def clean_prompt(text: str) -> str:
    """Mend broken unicode (ftfy), unescape HTML twice, fold white space."""
    # such text is whole, and ftfy slow to import
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = text.strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenized:
    """Prompts to embeddings, whatever computes them; subclasses add `load` and `_states`.

    Args:
        tokenizer: its folder.
    """

    def __init__(self, tokenizer: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.tokenizer_folder, self.dtype, self.device = tokenizer, dtype, device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_folder, "text encoder's tokenizer")

    def load(self) -> None:
        """Make the weights ready, if they are not."""
        raise NotImplementedError

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B, L], int64, to the encoder's last hidden states [B, L, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> Tensor:
        """Embeddings [B, max_sequence_length, D] in the encoder's dtype, zero after each prompt's
        last token.

        The padding is never run through the encoder: the batch is padded to its longest prompt,
        which the attention mask makes equal to padding it to the full length.
        """
        if not prompts:
            raise InputError(
                "the prompt list is empty; pass at least one prompt.",
                code="missing",
                param="prompt",
            )
        if max_sequence_length < 1:
            raise InputError(
                f"max_sequence_length is {max_sequence_length}; expected 1 to 512.",
                code="out_of_range",
                param="max_sequence_length",
            )
        self.load()
        texts = [clean_prompt(p) for p in prompts]
        self._warn_of_cut(texts, max_sequence_length)
        rows = [self.tokenizer.encode(text, limit=max_sequence_length) for text in texts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        mask = mask.to(self.device)
        with span("text"):
            states = self._states(ids.to(self.device), mask)
        states = states.to(self.dtype) * mask[..., None].to(self.dtype)
        return torch.nn.functional.pad(states, (0, 0, 0, max_sequence_length - states.shape[1]))

    def lost(self, text: str, limit: int = MAX_SEQUENCE_LENGTH) -> str | None:
        """What is lost of a prompt past the limit, which no generator reads, in a sentence without
        its subject; None where all is read."""
        ids = self.tokenizer.encode(text)
        if len(ids) <= limit:
            return None
        words = self.tokenizer.decode(ids[max(0, limit - 1) :])
        return (
            f"has {len(ids)} tokens and {limit} are read; what comes after is lost:"
            f" {shown(words, 120)}."
        )

    def _warn_of_cut(self, texts: list[str], limit: int) -> None:
        for text in texts:
            if (lost := self.lost(text, limit)) is not None:
                warnings.warn(f"the prompt {shown(text, 60)} {lost}", stacklevel=4)


class TextEncoder(Lazy, Tokenized):
    """A UMT5 encoder in PyTorch with its tokenizer, loaded when first used and dropped when asked.

    Args:
        folder: holds `text_encoder/` and `tokenizer/` in diffusers' layout, or is Wan's own folder,
            or a single file of weights.
        tokenizer: its folder, where it is not beside the weights.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: str | torch.device,
        tokenizer: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.weights_path, found = find_text(self.folder, tokenizer)
        super().__init__(found, dtype, torch.device(device))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return folder_bytes(self.weights_path)

    def _read(self) -> torch.nn.Module:
        return load_umt5(self.weights_path, self.dtype, self.device)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask)
