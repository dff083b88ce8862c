"""What each generator is told: the large one the text, the small one the text and what was
understood of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.components.understanding import UnderstandingModel
from nexus_rt.core.errors import ModelError, shown
from nexus_rt.core.tracing import span
from nexus_rt.loading.config import read_json
from nexus_rt.loading.connector import load_connector, read_config
from nexus_rt.loading.locate import folder_bytes
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.connector import Connector


def unpad(text: Tensor) -> Tensor:
    """Rows of an embedding [L, D] up to its last that is not zero: the prompt without its
    padding."""
    used = (text != 0).any(-1).nonzero()
    return text[: int(used[-1]) + 1] if len(used) else text[:0]


class ContextEncoder(Lazy):
    """Understanding model and connector, together the context of the small generator; each loaded
    when first used.

    Args:
        understanding, connector: their folders.
    """

    def __init__(
        self, understanding: Path, connector: Path, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.folder, self.dtype, self.device = Path(connector), dtype, torch.device(device)
        self.config = read_config(self.folder)
        self.understanding = UnderstandingModel(understanding, self.config.template, dtype, device)
        config = read_json(Path(understanding) / "config.json")
        inner = config.get("text_config")
        width = {**config, **(inner if isinstance(inner, dict) else {})}.get("hidden_size")
        if width != self.config.llm_hidden_size:
            raise ModelError(
                f"the understanding model's hidden size is {shown(width, 40)} and the connector"
                f" reads {self.config.llm_hidden_size}; pair the two that were trained together.",
                code="mismatch",
                param="hidden_size",
            )

    @property
    def text_dim(self) -> int:
        return self.config.text_dim

    @property
    def connector(self) -> Connector:
        """The connector, loaded."""
        self.load()
        return self.model

    @property
    def nbytes(self) -> int:
        """Bytes of the connector's stored weights; the understanding model counts its own."""
        return folder_bytes(self.folder)

    def _read(self) -> Connector:
        return load_connector(self.folder, self.dtype, self.device)

    def unload(self) -> None:
        """Leave the weights of both in host memory; on a CPU, drop them."""
        self.understanding.unload()
        super().unload()

    def drop(self) -> None:
        """Free the understanding model and the connector; the next call loads them again."""
        self.understanding.drop()
        super().drop()

    def unconditional_text(self) -> Tensor | None:
        """The stored embedding [m, text_dim] that stands for no prompt, if the checkpoint has
        one."""
        return self.connector.unconditional_text

    @torch.no_grad()
    def encode(self, prompts: list[str], text: Tensor, single_frame: bool = False) -> Tensor:
        """Contexts [B, max_context_len, text_dim] of prompts, given their text embeddings [B, L,
        text_dim]."""
        connector = self.connector
        contexts = []
        for prompt, rows in zip(prompts, text, strict=True):
            # raw, as published
            hidden = self.understanding.hidden_states(prompt.strip(), single_frame)
            with span("connector"):
                contexts.append(connector.pack(unpad(rows), connector(hidden, single_frame)[0]))
        return torch.stack(contexts)

    @torch.no_grad()
    def encode_unconditional(self, text: Tensor, single_frame: bool = False) -> Tensor:
        """Contexts [B, max_context_len, text_dim] of the negative branch: its text [B, L, text_dim]
        behind the stored unconditional hidden states (an empty prompt's, where the checkpoint
        stores none)."""
        connector = self.connector
        hidden = connector.unconditional_hidden
        hidden = (
            self.understanding.hidden_states("", single_frame)
            if hidden is None
            else hidden.reshape(1, -1, hidden.shape[-1])
        )
        with span("connector"):
            adapter = connector(hidden, single_frame)[0]
            return torch.stack([connector.pack(unpad(rows), adapter) for rows in text])
