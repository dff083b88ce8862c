"""The understanding model: any transformers language model, read for its last hidden states, and
asked what a prompt means.

A prompt is set into a chat template that ends with a marker token (`[GEN_VID]`), and the hidden
states of all its tokens go to the connector. For rewriting (`nexus_rt.pipeline.rewriting`) the
prompt is set into `Template.chat` instead, and the model's own causal head answers greedily.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.core.tracing import span
from nexus_rt.loading.checkpoint import read_checked
from nexus_rt.loading.config import check_config, read_optional
from nexus_rt.loading.llama import load_llama
from nexus_rt.loading.locate import folder_bytes, require_safetensors
from nexus_rt.loading.pretrained import pretrained
from nexus_rt.loading.tensors import find_tensors
from nexus_rt.loading.tokenizer import load_tokenizer
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.llama import LlamaBackbone, greedy, is_native
from nexus_rt.models.template import Template
from nexus_rt.models.tokenizer import Tokenizer

MAX_ANSWER = 256  # tokens
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>")  # of a turn, in the usual chat formats


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
            raise ModelError(
                f"{self.folder} is no understanding model: it has no config.json.", code="not_found"
            )
        self.tokenizer: Tokenizer  # and the most tokens it reads, once loaded
        self.positions: int | None = None
        self.head: Tensor | None = None
        self.talker: Any = None

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
                    " the tokenizer that came with the checkpoint, or set the template's markers.",
                    code="mismatch",
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
                f" {self.positions}: shorten it.",
                code="too_large",
                param="prompt",
            )
        ids = torch.tensor([row], device=self.device)
        with span("understanding"):
            if isinstance(self.model, LlamaBackbone):
                return self.model(ids, self._mask(ids))
            return self.model(
                input_ids=ids, attention_mask=self._mask(ids), use_cache=False
            ).last_hidden_state

    @torch.no_grad()
    def answer(self, prompt: str, deadline: float | None = None, limit: int = MAX_ANSWER) -> str:
        """What the model answers to a prompt in `Template.chat`: greedy, at most `limit` tokens.

        Args:
            deadline: of `time.monotonic()`.

        Raises:
            TimeoutError: the deadline passed.
            InputError: the prompt is longer than the model's positions.
            ModelError: the folder holds no causal head.
        """
        self.load()
        if not isinstance(self.model, LlamaBackbone):
            return self._answer_by_transformers(prompt, deadline, limit)
        ids = self.tokenizer.encode(self.template.chat.replace("{prompt}", prompt), special=False)
        room = limit if self.positions is None else min(limit, self.positions - len(ids))
        if room < 1:
            raise InputError(
                f"the prompt is {len(ids)} tokens with its chat template; the model reads"
                f" {self.positions}: shorten it.",
                code="too_large",
                param="prompt",
            )

        def proceed() -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError("no whole answer within the time for rewriting")

        new = greedy(self.model, self._head(), ids, self._stops(), room, proceed)
        return self.tokenizer.decode(new)

    def _head(self) -> Tensor:
        """The logits' weight: the embedding's where they are tied, else read from the folder."""
        assert isinstance(self.model, LlamaBackbone)
        if self.model.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        if self.head is None:
            stored = find_tensors(self.folder)
            head = {n: t for n, t in stored.items() if n == "lm_head.weight"}
            shape = self.model.embed_tokens.weight.shape
            if not head or head["lm_head.weight"].shape != tuple(shape):
                raise ModelError(
                    f"{self.folder} has no lm_head.weight of shape {list(shape)} to answer with;"
                    " use a causal language model's folder, or another rewriter.",
                    code="missing",
                )
            self.head = dict(read_checked(head, self.dtype, self.device))["lm_head.weight"]
        return self.head

    def _stops(self) -> set[int]:
        """Tokens that end an answer."""
        ends = read_optional(self.folder / "generation_config.json").get("eos_token_id")
        stops = {self.tokenizer.eos_id, *(ends if isinstance(ends, list) else [ends])}
        stops |= {self.tokenizer.token_id(name) for name in ENDS}
        return {token for token in stops if isinstance(token, int)}

    def _answer_by_transformers(self, prompt: str, deadline: float | None, limit: int) -> str:
        """By the folder's own class with a head, which is read beside the backbone and freed with
        it."""
        if self.talker is None:
            self.talker = pretrained(
                "AutoModelForCausalLM",
                self.folder,
                "understanding model",
                self.device,
                dtype=self.dtype,
                use_safetensors=True,
            )
        ids = self.tokenizer.encode(self.template.chat.replace("{prompt}", prompt), special=False)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        row = torch.tensor([ids], device=self.device)
        out = self.talker.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=limit,
            max_time=left,
            do_sample=False,
            eos_token_id=sorted(self._stops()) or None,
        )
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("no whole answer within the time for rewriting")
        return self.tokenizer.decode(out[0, len(ids) :].tolist())

    def unload(self) -> None:
        """Leave the weights in host memory; on a CPU, drop them."""
        self.head = self.talker = None
        super().unload()

    def drop(self) -> None:
        """Free the weights; the next use reads them again."""
        self.head = self.talker = None
        super().drop()

    def _mask(self, ids: Tensor) -> Tensor:
        """`ids != pad`, as the published code has it: the end token stands in for a padding token
        that is not there, and so is attended to nowhere in a template that holds it."""
        pad = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        return torch.ones_like(ids) if pad is None else (ids != pad).to(ids.dtype)
