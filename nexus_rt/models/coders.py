"""Prompts to embeddings and latents to frames, whatever computes them: the bases of the components
in PyTorch and of the engines."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import DecodeError, InputError, shown
from nexus_rt.core.limits import MAX_SEQUENCE_LENGTH
from nexus_rt.core.tracing import span
from nexus_rt.media.latents import rescue_latents, save_latents
from nexus_rt.models.tokenizer import Tokenizer

# pixels (of all frames) decoded in one call: small clips gain four times from it, large ones go
# alone
TOGETHER = 2**21


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
        read_tokenizer: makes the tokenizer when it is first needed.
    """

    def __init__(
        self, read_tokenizer: Callable[[], Tokenizer], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.read_tokenizer, self.dtype, self.device = read_tokenizer, dtype, device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.read_tokenizer()

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


class Decoder:
    """Latents to frames, whatever computes them; `space` is that of its latents. Subclasses add
    `load` and `decode_video`."""

    def __init__(self, space: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.space, self.dtype, self.device = space, dtype, device

    @property
    def spatial(self) -> int:
        """Pixels per latent cell."""
        return int(self.space["scale_factor_spatial"])

    @property
    def temporal(self) -> int:
        """Frames per latent frame, after the first."""
        return int(self.space["scale_factor_temporal"])

    def load(self) -> None:
        """Make the weights ready, if they are not."""
        raise NotImplementedError

    def decode_video(self, z: Tensor) -> Tensor:
        """The VAE's own latents [B, C, T, H, W] to frames [B, 3, F, 8 H, 8 W] in [-1, 1]."""
        raise NotImplementedError

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(self.space[k], device=device).view(1, -1, 1, 1, 1)
            for k in ("latents_mean", "latents_std")
        )
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor, rescue: str | Path | None = None) -> Tensor:
        """Normalised latents [B, C, T, H, W] to frames [B, F, 3, H, W] in [0, 1], float32; large
        clips one at a time.

        Args:
            rescue: where to save the latents if decoding fails: a folder (default, and where it is
                full or cannot be written: the system's temporary one).

        Raises:
            DecodeError: anything went wrong, running out of memory included; carries the path of
                the saved latents.
        """
        try:
            self.load()
            height, width = (s * self.spatial for s in latents.shape[-2:])
            mean, std = self._statistics(self.device)
            out = []
            frames = (latents.shape[2] - 1) * self.temporal + 1
            together = max(1, TOGETHER // (frames * height * width))
            for sample in latents.to(self.device, torch.float32).split(together):
                with span("vae"):
                    video = self.decode_video((sample * std + mean).to(self.dtype))
                out.append(video.float().add_(1).div_(2).clamp_(0, 1))
            return torch.cat(out).transpose(1, 2)
        except Exception as error:
            # a folder that is not there is the caller's mistake
            named = rescue is not None and not Path(rescue).is_dir()
            path = save_latents(latents, rescue) if named else rescue_latents(latents, rescue)
            saved = (
                f"the latents are saved in {path}; decode them again with `nexus-rt decode`"
                if path
                else "and saving them failed too"
            )
            raise DecodeError(
                f"decoding failed ({type(error).__name__}: {error}); {saved}.", path
            ) from error
