"""The understanding model: any transformers language model, read for its last hidden states.

It generates nothing. A prompt is set into a chat template that ends with a marker token (`[GEN_VID]`), and the hidden
states of all its tokens go to the connector.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.errors import InputError, ModelError, cut
from nexus_rt.models.load import folder_bytes, require_safetensors
from nexus_rt.models.moving import Lazy
from nexus_rt.models.pretrained import pretrained
from nexus_rt.tracing import span

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
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
    """What a prompt is set into, `{prompt}` marking its place; by default Omni-Video's, in Llama 3's chat format."""

    video: str = _llama3("a video", "[GEN_VID]")
    image: str = _llama3("an image", "[GEN_IMG]")  # for a single frame
    video_marker: str = "[GEN_VID]"
    image_marker: str = "[GEN_IMG]"

    def __post_init__(self) -> None:
        for name, marker in (("video", self.video_marker), ("image", self.image_marker)):
            text = getattr(self, name)
            if text.count("{prompt}") != 1:
                raise ModelError(
                    f"the {name} template has {text.count('{prompt}')} prompt slots; expected exactly one '{{prompt}}'."
                )
            if not marker or marker not in text:
                raise ModelError(f"the {name} template lacks its marker {cut(marker, 80)}; it must end in it.")

    @classmethod
    def from_dict(cls, values: dict) -> Template:
        """Read the `template` object of a connector's config."""
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ModelError("the template is no object of texts; expected video, image and their markers.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ModelError(
                f"the template sets an unknown {cut(repr(unknown[0]), 80)}; expected video, image and their markers."
            )
        return cls(**values)

    def render(self, prompt: str, single_frame: bool = False) -> str:
        """The text the model reads."""
        return (self.image if single_frame else self.video).replace("{prompt}", prompt)


class UnderstandingModel(Lazy):
    """A causal or image-text-to-text model with its tokenizer, loaded when first used and dropped when asked.

    Args:
        folder: of `save_pretrained`: config, safetensors, tokenizer.
    """

    def __init__(self, folder: Path, template: Template, dtype: torch.dtype, device: str | torch.device) -> None:
        self.folder, self.template, self.dtype, self.device = Path(folder), template, dtype, torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise ModelError(f"{self.folder} is no understanding model: it has no config.json.")
        self.tokenizer: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return folder_bytes(self.folder)

    def _read(self) -> torch.nn.Module:
        """The backbone alone (hidden states need no vocabulary head), its tokenizer checked for the markers."""
        require_safetensors(self.folder)
        self.tokenizer = pretrained("AutoTokenizer", self.folder, "understanding model")
        for marker in (self.template.video_marker, self.template.image_marker):
            ids = self.tokenizer(marker, add_special_tokens=False).input_ids
            known = self.tokenizer.convert_tokens_to_ids(marker)
            if known is None or known == self.tokenizer.unk_token_id or known not in ids:
                raise ModelError(
                    f"{self.folder}: the tokenizer lacks {marker}, which this template ends in; use the tokenizer "
                    "that came with the checkpoint, or set the template's markers."
                )
        return pretrained("AutoModel", self.folder, "understanding model", self.device, dtype=self.dtype, use_safetensors=True)

    @torch.no_grad()
    def hidden_states(self, prompt: str, single_frame: bool = False) -> Tensor:
        """Last hidden states [1, L, D] of every token of the templated prompt, in the model's dtype.

        Raises:
            InputError: the templated prompt is longer than the model's positions.
        """
        self.load()
        ids = self.tokenizer(
            self.template.render(prompt, single_frame), add_special_tokens=False, return_tensors="pt"
        ).input_ids
        config = getattr(self.model.config, "text_config", self.model.config)
        limit = getattr(config, "max_position_embeddings", None)
        if limit and ids.shape[1] > limit:
            raise InputError(f"the prompt is {ids.shape[1]} tokens with its template; the model reads {limit}: shorten it.")
        ids = ids.to(self.device)
        with span("understanding"):
            return self.model(input_ids=ids, attention_mask=self._mask(ids), use_cache=False).last_hidden_state

    def _mask(self, ids: Tensor) -> Tensor:
        """`ids != pad`, as the published code has it: the end token stands in for a padding token that is not there, and so
        is attended to nowhere in a template that holds it."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return torch.ones_like(ids) if pad is None else (ids != pad).to(ids.dtype)
