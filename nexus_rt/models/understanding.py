"""The understanding model: any transformers language model, read for its last hidden states.

It generates nothing. A prompt is set into a chat template that ends with a marker token
(`[GEN_VID]`), and the hidden states of all its tokens go to the connector.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.errors import InputError, ModelError, cut
from nexus_rt.loading.pretrained import check_config, pretrained
from nexus_rt.loading.source import folder_bytes, require_safetensors
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.llama import LlamaBackbone, is_native, load_llama
from nexus_rt.models.tokenizer import Tokenizer, load_tokenizer
from nexus_rt.tracing import span

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM + "<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGenerate {kind} about:\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{marker}<|end_of_text|>"
)


def _llama3(kind: str, marker: str) -> str:
    return _LLAMA3.replace("{kind}", kind).replace("{marker}", marker)


@dataclass(frozen=True)
class Template:
    """What a prompt is set into, `{prompt}` marking its place; by default Omni-Video's, in Llama
    3's chat format."""

    video: str = _llama3("a video", "[GEN_VID]")
    image: str = _llama3("an image", "[GEN_IMG]")  # for a single frame
    video_marker: str = "[GEN_VID]"
    image_marker: str = "[GEN_IMG]"

    def __post_init__(self) -> None:
        for name, marker in (("video", self.video_marker), ("image", self.image_marker)):
            text = getattr(self, name)
            if text.count("{prompt}") != 1:
                raise ModelError(
                    f"the {name} template has {text.count('{prompt}')} prompt slots; expected"
                    " exactly one '{prompt}'."
                )
            if not marker or marker not in text:
                raise ModelError(
                    f"the {name} template lacks its marker {cut(marker, 80)}; it must end in it."
                )

    @classmethod
    def from_dict(cls, values: dict) -> Template:
        """Read the `template` object of a connector's config."""
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ModelError(
                "the template is no object of texts; expected video, image and their markers."
            )
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ModelError(
                f"the template sets an unknown {cut(repr(unknown[0]), 80)}; expected video, image"
                " and their markers."
            )
        return cls(**values)

    def render(self, prompt: str, single_frame: bool = False) -> str:
        """The text the model reads."""
        return (self.image if single_frame else self.video).replace("{prompt}", prompt)


class UnderstandingModel(Lazy):
    """A causal or image-text-to-text model with its tokenizer, loaded when first used and dropped
    when asked.

    Args:
        folder: of `save_pretrained`: config, safetensors, tokenizer.
    """

    def __init__(
        self, folder: Path, template: Template, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.folder, self.template, self.dtype, self.device = (
            Path(folder),
            template,
            dtype,
            torch.device(device),
        )
        if not (self.folder / "config.json").is_file():
            raise ModelError(f"{self.folder} is no understanding model: it has no config.json.")
        self.tokenizer: Tokenizer  # and the most tokens it reads, once loaded
        self.positions: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return folder_bytes(self.folder)

    def _read(self) -> torch.nn.Module:
        """The backbone alone (hidden states need no vocabulary head), its tokenizer checked for the
        markers."""
        require_safetensors(self.folder)
        self.tokenizer = load_tokenizer(self.folder, "understanding model's tokenizer")
        for marker in (self.template.video_marker, self.template.image_marker):
            known = self.tokenizer.token_id(marker)
            if (
                known is None
                or known == self.tokenizer.unk_id
                or known not in self.tokenizer.encode(marker, special=False)
            ):
                raise ModelError(
                    f"{self.folder}: the tokenizer lacks {marker}, which this template ends in; use"
                    " the tokenizer that came with the checkpoint, or set the template's markers."
                )
        config = check_config(self.folder, "understanding model")
        if is_native(config):
            model = load_llama(self.folder, config, self.dtype, self.device)
            self.positions = model.config.max_position_embeddings
            return model
        model = pretrained(
            "AutoModel",
            self.folder,
            "understanding model",
            self.device,
            dtype=self.dtype,
            use_safetensors=True,
        )
        self.positions = getattr(
            getattr(model.config, "text_config", model.config), "max_position_embeddings", None
        )
        return model

    @torch.no_grad()
    def hidden_states(self, prompt: str, single_frame: bool = False) -> Tensor:
        """Last hidden states [1, L, D] of every token of the templated prompt, in the model's
        dtype.

        Raises:
            InputError: the templated prompt is longer than the model's positions.
        """
        self.load()
        row = self.tokenizer.encode(self.template.render(prompt, single_frame), special=False)
        if self.positions and len(row) > self.positions:
            raise InputError(
                f"the prompt is {len(row)} tokens with its template; the model reads"
                f" {self.positions}: shorten it."
            )
        ids = torch.tensor([row], device=self.device)
        with span("understanding"):
            if isinstance(self.model, LlamaBackbone):
                return self.model(ids, self._mask(ids))
            return self.model(
                input_ids=ids, attention_mask=self._mask(ids), use_cache=False
            ).last_hidden_state

    def _mask(self, ids: Tensor) -> Tensor:
        """`ids != pad`, as the published code has it: the end token stands in for a padding token
        that is not there, and so is attended to nowhere in a template that holds it."""
        pad = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        return torch.ones_like(ids) if pad is None else (ids != pad).to(ids.dtype)
