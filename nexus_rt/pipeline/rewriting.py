"""Rewriting: the large generator reads, instead of the prompt, what an understanding model says
it means.

`p' = LM.generate(chat(p))`, greedy; the large generator's context is the text encoder's embedding
of p', the small one keeps its own. A pretrained generator draws what a caption says and does not
reason, so it is told the answer rather than the riddle.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nexus_rt.components.understanding import MAX_ANSWER, UnderstandingModel
from nexus_rt.core.chat import ChatClient
from nexus_rt.core.checks import check_unicode
from nexus_rt.core.deadline import begin, result_within
from nexus_rt.core.errors import (
    InputError,
    ModelError,
    NexusError,
    RewriteError,
    is_text,
    shorten,
    shown,
)
from nexus_rt.core.limits import REWRITE_TIMEOUT
from nexus_rt.core.log import logger
from nexus_rt.core.paths import as_path
from nexus_rt.core.tracing import span
from nexus_rt.loading.config import check_config
from nexus_rt.loading.locate import require_safetensors
from nexus_rt.loading.pretrained import pretrained
from nexus_rt.memory.offload import release
from nexus_rt.models.template import REWRITE
from nexus_rt.pipeline.assemble import default_device, default_dtype
from nexus_rt.pipeline.settings import is_off

CACHED = 1024
KEY = "NEXUS_RT_REWRITER_KEY"

Rewriter = Callable[[str], str]


@dataclass
class Rewriting:
    """A call's rewriting.

    texts: what the large generator reads, a text a prompt. failures: why a prompt was kept as it
    is, by its place. ms: milliseconds that it took; kept answers take none.
    """

    texts: list[str]
    failures: dict[int, str] = field(default_factory=dict)
    ms: float = 0.0


def check_rewrite(rewrite: Any, prompts: int | None) -> None:
    """Raise an `InputError` unless `rewrite` is one that a call of this many prompts (None: of
    embeddings) can take."""
    texts = rewrite if isinstance(rewrite, (list, tuple)) else None
    if texts is not None and not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(
            "rewrite holds something else than texts; expected one for each prompt.",
            code="invalid_type",
            param="rewrite",
        )
    own = [("rewrite", rewrite)] if isinstance(rewrite, str) else []
    for name, text in own or [(f"rewrite[{i}]", t) for i, t in enumerate(texts or ())]:
        check_unicode(name, text, "rewrite")
    if texts is not None and prompts is not None and len(texts) != prompts:
        raise InputError(
            f"rewrite has {len(texts)} texts for {prompts} prompts; expected as many.",
            code="mismatch",
            param="rewrite",
        )
    known = rewrite is None or callable(rewrite) or texts is not None
    if not known and not (isinstance(rewrite, str) and rewrite.strip()):
        raise InputError(
            f"rewrite is {shown(rewrite)}; expected 'auto', 'off', a text for the large"
            " generator, or a function of a prompt.",
            code="missing" if isinstance(rewrite, str) else "invalid_type",
            param="rewrite",
        )
    if prompts is None and rewrite is not None and not is_off(rewrite):
        raise InputError(
            "rewrite goes with prompt; pass prompt_embeds_2, the large generator's, beside"
            " prompt_embeds.",
            code="conflict",
            param="rewrite",
        )


def rewrite_prompts(
    prompts: Sequence[str],
    rewrite: str | Sequence[str] | Rewriter,
    model: UnderstandingModel | None,
    cache: Cache,
    timeout: float = REWRITE_TIMEOUT,
) -> Rewriting:
    """What the large generator reads.

    Args:
        rewrite: "auto" (`model` answers), a text for all prompts, one for each, or a function of a
            prompt.
        cache: answers of the same model to the same prompt.
        timeout: seconds for all prompts; those that it does not reach are kept as they are.

    Returns:
        Texts; a prompt whose rewriting failed is kept, with the reason.

    Raises:
        InputError: "auto" and there is no understanding model.
    """
    if isinstance(rewrite, str) and rewrite != "auto":
        return Rewriting([rewrite] * len(prompts))
    if not isinstance(rewrite, str) and not callable(rewrite):
        return Rewriting(list(rewrite))
    source: Any = rewrite
    if isinstance(rewrite, str):  # "auto"
        if model is None:
            raise InputError(
                "rewrite='auto' asks the pair's understanding model, and this pair has none; pass"
                " understanding= and connector=, a text, or a function such as ChatRewriter.",
                code="missing",
                param="understanding",
            )
        source = model
    begun = time.perf_counter()
    deadline, out = time.monotonic() + timeout, Rewriting(list(prompts))
    with span("rewrite"):
        for i, prompt in enumerate(prompts):
            try:
                out.texts[i] = cache.get(source, prompt, partial(_ask, source, prompt, deadline))
            except Exception as error:  # whatever a caller's function raises
                reason = shorten(error if str(error) else type(error).__name__)
                out.failures[i] = reason
                logger.warning(
                    "rewriting failed (%s); the large generator reads the prompt as it is", reason
                )
    out.ms = 1000 * (time.perf_counter() - begun)
    return out


def _ask(source: Any, prompt: str, deadline: float) -> str:
    """One answer before the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for rewriting is over")
    if isinstance(source, UnderstandingModel):
        answer: Any = source.answer(prompt, deadline)
    else:
        answer = result_within(begin(lambda: source(prompt)), left)
    text = " ".join(answer.split()) if isinstance(answer, str) else ""
    if not text or not is_text(text):
        raise ModelError(f"the answer is {shown(answer)}; expected a text", code="rewrite_failed")
    return text


class Cache:
    """Answers by who gave them and the prompt, the newest `CACHED`; failures are not kept."""

    def __init__(self) -> None:
        self.answers: OrderedDict[tuple[int, str], str] = OrderedDict()
        self.sources: dict[int, Any] = {}  # kept alive, so that an id stays theirs
        self.lock = threading.Lock()

    def get(self, source: Any, prompt: str, ask: Callable[[], str]) -> str:
        """The kept answer, or a new one."""
        key = id(source), prompt
        with self.lock:
            self.sources[id(source)] = source
            if key in self.answers:
                self.answers.move_to_end(key)
                return self.answers[key]
        try:
            answer = ask()
        except BaseException:
            with self.lock:  # a caller's functions that only fail are not kept alive
                self._forget()
            raise
        with self.lock:
            self.sources[id(source)] = source
            self.answers[key] = answer
            while len(self.answers) > CACHED:
                self.answers.popitem(last=False)
            self._forget()
        return answer

    def _forget(self) -> None:
        """Let go of sources without answers."""
        used = {owner for owner, _ in self.answers}
        self.sources = {k: v for k, v in self.sources.items() if k in used}


def _messages(system: str, prompt: str) -> list[dict[str, str]]:
    """The conversation that a chat model answers."""
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


class ChatRewriter:
    """Any chat model folder of transformers' layout as a rewriter, greedy by its own chat template.

    Args:
        folder: config, safetensors, tokenizer with a chat template.
        system: the instruction before the prompt.

    Raises:
        ModelError: at the first call, a folder that is no chat model.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        system: str = REWRITE,
        max_new_tokens: int = MAX_ANSWER,
    ) -> None:
        self.folder, self.system, self.limit = as_path("folder", folder), system, max_new_tokens
        self.device = default_device(device)
        self.dtype = default_dtype(dtype, self.device)
        self.model: Any = None
        self.tokenizer: Any = None
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is no chat model: it has no config.json.", code="missing", param="folder"
            )

    def __repr__(self) -> str:
        return f"ChatRewriter({str(self.folder)!r})"

    def load(self) -> None:
        """Read the weights, unless they are in memory."""
        if self.model is not None:
            return
        what = "rewriter"
        require_safetensors(self.folder)
        config = check_config(self.folder, what)
        tokenizer = pretrained("AutoTokenizer", self.folder, what)
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"{self.folder} has no chat template; expected a chat model's folder.",
                code="missing",
                param="chat_template",
            )
        kind = (
            "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"
        )
        self.model = pretrained(
            kind, self.folder, what, self.device, dtype=self.dtype, use_safetensors=True
        )
        self.tokenizer = tokenizer

    def drop(self) -> None:
        """Free the weights; the next call reads them again."""
        self.model = self.tokenizer = None
        release(self.device)

    @torch.no_grad()
    def __call__(self, prompt: str) -> str:
        self.load()
        messages = _messages(self.system, prompt)
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.device)
        out = self.model.generate(**inputs, max_new_tokens=self.limit, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class EndpointRewriter:
    """An OpenAI-compatible chat endpoint as a rewriter.

    Args:
        url: such as "http://localhost:8000/v1". model: the name that it serves.
        api_key: by default that of the environment variable NEXUS_RT_REWRITER_KEY.
        timeout: seconds for one request.

    Raises:
        InputError: no http or https URL, or a key that no header can carry.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        timeout: float = REWRITE_TIMEOUT,
        system: str = REWRITE,
    ) -> None:
        key = os.environ.get(KEY) if api_key is None else api_key
        self.client = ChatClient(url, key, timeout, key_name=KEY)
        self.model, self.system = model, system

    def __repr__(self) -> str:
        return f"EndpointRewriter({self.client.address!r}, {self.model!r})"

    def __call__(self, prompt: str) -> str:
        messages = _messages(self.system, prompt)
        try:
            reply = self.client.reply({"model": self.model, "messages": messages, "temperature": 0})
        except NexusError as error:
            raise RewriteError(f"{self.client.host}: {error}") from error
        if reply.refusal or not reply.text:
            raise RewriteError(f"{self.client.host}: an answer without text")
        return reply.text
