"""Prompts to UMT5 embeddings, as diffusers' WanPipeline makes them."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.errors import InputError, ModelError
from nexus_rt.models.load import pretrained, release, require_safetensors

MAX_SEQUENCE_LENGTH = 512  # Wan's text length: the transformer attends to the zero padding too


def clean_prompt(text: str) -> str:
    """Mend broken unicode (ftfy), unescape HTML twice, fold white space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """A UMT5 encoder with its tokenizer, loaded when first used and dropped when asked.

    Args:
        folder: holds `text_encoder/` and `tokenizer/` in diffusers' layout.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str | torch.device) -> None:
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        for part, file in (("text_encoder", "config.json"), ("tokenizer", "tokenizer_config.json")):
            if not (self.folder / part / file).is_file():
                raise ModelError(f"{self.folder} has no {part}/{file}; expected a folder with text_encoder/ and tokenizer/.")
        self.model: Any = None
        self.tokenizer: Any = None

    def load(self) -> None:
        """Read tokenizer and weights, if they are not in memory."""
        if self.model is not None:
            return
        require_safetensors(self.folder / "text_encoder")
        self.tokenizer = pretrained("AutoTokenizer", self.folder / "tokenizer", "text encoder")
        self.model = pretrained(
            "UMT5EncoderModel",
            self.folder / "text_encoder",
            "text encoder",
            self.device,
            dtype=self.dtype,
            use_safetensors=True,
        )

    def drop(self) -> None:
        """Free the weights; the next `encode` loads them again."""
        self.model = None
        release(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> Tensor:
        """Embeddings [B, max_sequence_length, D] in the encoder's dtype, zero after each prompt's last token.

        The padding is never run through the encoder: the batch is padded to its longest prompt, which the attention
        mask makes equal to padding it to the full length.
        """
        if not prompts:
            raise InputError("the prompt list is empty; pass at least one prompt.")
        if max_sequence_length < 1:
            raise InputError(f"max_sequence_length is {max_sequence_length}; expected 1 to 512.")
        self.load()
        batch = self.tokenizer(
            [clean_prompt(p) for p in prompts], padding="longest", max_length=max_sequence_length, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        mask = batch.attention_mask.to(self.device)
        states = self.model(batch.input_ids.to(self.device), mask).last_hidden_state
        states = states.to(self.dtype) * mask[..., None].to(self.dtype)
        return torch.nn.functional.pad(states, (0, 0, 0, max_sequence_length - states.shape[1]))
