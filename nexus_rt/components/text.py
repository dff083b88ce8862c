"""Prompts to UMT5 embeddings, as diffusers' WanPipeline makes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.loading.locate import find_text, folder_bytes
from nexus_rt.loading.tokenizer import load_tokenizer
from nexus_rt.loading.umt5 import load_umt5
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.coders import Tokenized


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
        self.weights_path, tokenizer = find_text(self.folder, tokenizer)
        read = partial(load_tokenizer, tokenizer, "text encoder's tokenizer")
        super().__init__(read, dtype, torch.device(device))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return folder_bytes(self.weights_path)

    def _read(self) -> torch.nn.Module:
        return load_umt5(self.weights_path, self.dtype, self.device)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask)
