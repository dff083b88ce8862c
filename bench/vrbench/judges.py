"""What answers a clip's questions: an OpenAI-compatible endpoint, or a transformers image-text-to-text model in this process.

Both take a conversation: `[{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}]`, whose image parts stand for
the clip's frames in their order, and return the reply's text. Temperature 0, 1,024 new tokens, as published for Qwen3-VL.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nexus_rt.bench.pictures import data_url
from nexus_rt.bench.results import folder_fingerprint
from nexus_rt.errors import InputError, ModelError, NexusError
from nexus_rt.loading import default_device, default_dtype
from nexus_rt.models.load import require_safetensors
from nexus_rt.models.pretrained import pretrained

NEW_TOKENS = 1024
KEY = "OPENAI_API_KEY"
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # what another try may mend
TRIES, FIRST_WAIT, LONGEST_WAIT, TIMEOUT = 6, 1.0, 60.0, 300.0

Conversation = list[dict[str, Any]]


class JudgeError(NexusError):
    """The judge gave no reply for one clip; another run may mend it."""


class JudgeUnusable(NexusError):
    """No clip can be judged: the judge cannot be reached, or refuses us."""


class Judge(Protocol):
    """name: what makes its answers its own; parallel: whether `reply` may be called from several threads; stop: give up what
    waits to be tried again."""

    name: str
    parallel: bool

    def stop(self) -> None: ...

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> str:
        """The next message of a conversation; frames: [H, W, 3] uint8 for its image parts."""
        ...


class HttpJudge:
    """`POST {url}/chat/completions`, tried again with growing waits where the server is busy or fails.

    Args:
        url: up to and including `/v1`, or the whole address of `chat/completions`.
        model: what the server calls it.
        wait: sleeps for some seconds between tries.

    The key is read from `OPENAI_API_KEY`; without one no Authorization header is sent.
    """

    parallel = True

    def __init__(
        self, url: str, model: str, timeout: float = TIMEOUT, tries: int = TRIES, wait: Callable[[float], Any] | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--judge-url is {url!r}; expected http:// or https://, such as http://localhost:8000/v1.")
        self.url = url.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.model, self.timeout, self.tries, self._stopped = model, timeout, tries, threading.Event()
        self._wait = wait or self._stopped.wait
        self.name = f"{model} at {self.url}"
        self._local = threading.local()

    def stop(self) -> None:
        """Give up what waits to be tried again; requests on their way are answered still."""
        self._stopped.set()

    def _session(self):
        import requests

        if not hasattr(self._local, "session"):  # a session each thread: they are not made to be shared
            self._local.session = requests.Session()
            if key := os.environ.get(KEY):
                self._local.session.headers["Authorization"] = f"Bearer {key}"
        return self._local.session

    def _body(self, talk: Conversation, frames: Sequence[np.ndarray]) -> dict[str, Any]:
        left = iter(frames)
        messages = []
        for message in talk:
            parts = [
                {"type": "image_url", "image_url": {"url": data_url(next(left), "JPEG")}} if part["type"] == "image" else part
                for part in message["content"]
            ]
            alone = len(parts) == 1 and parts[0]["type"] == "text"
            messages.append({"role": message["role"], "content": parts[0]["text"] if alone else parts})
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> str:
        """As `Judge.reply`.

        Raises:
            JudgeUnusable: no connection after all tries, or the server refuses the key, the address or the model.
            JudgeError: it stayed busy or failing, or answered something else than a completion.
        """
        import requests

        body, why, reached, said = self._body(talk, frames), "nothing", False, None
        for turn in range(self.tries):
            if turn:
                self._wait(_pause(turn, said))
            if self._stopped.is_set():
                raise JudgeError("stopped")
            said = None
            try:
                answer = self._session().post(self.url, json=body, timeout=self.timeout)
            except requests.Timeout:
                why, reached = f"no answer within {self.timeout:g} s", True
                continue
            except requests.RequestException as error:
                why = f"{type(error).__name__}: {error}"
                continue
            reached = True
            if answer.status_code in (401, 403, 404):
                raise JudgeUnusable(
                    f"the judge refuses us with {answer.status_code} ({answer.text[:200].strip()}); check --judge-url, "
                    f"--judge-model and the key in {KEY}."
                )
            if answer.status_code in PASSING:
                why, said = f"status {answer.status_code}", answer.headers.get("Retry-After")
                continue
            if not answer.ok:
                raise JudgeError(f"status {answer.status_code}: {answer.text[:200].strip()}")
            try:
                content = answer.json()["choices"][0]["message"]["content"]
            except (ValueError, KeyError, IndexError, TypeError):
                why = f"a body that is no chat completion: {answer.text[:100]!r}"
                continue
            return content if isinstance(content, str) else ""
        if not reached:
            raise JudgeUnusable(f"the judge at {self.url} cannot be reached ({why}); start it, or check --judge-url.")
        raise JudgeError(f"{self.tries} tries failed, the last with {why}")


def _pause(turn: int, said: str | None) -> float:
    """Seconds before a try: what the server asked for, else doubling, a random half of it so that threads spread out."""
    try:
        return min(max(float(said), 0.0), LONGEST_WAIT)
    except (TypeError, ValueError):
        return min(FIRST_WAIT * 2 ** (turn - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)


class LocalJudge:
    """A transformers image-text-to-text model (Qwen3-VL is the published one), read when first asked, greedy.

    Args:
        folder: of `save_pretrained`: model in safetensors, processor, chat template.
    """

    parallel = False

    def __init__(self, folder: str | Path, device: Any = None, dtype: Any = None) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{folder} holds no config.json; expected a folder with an image-text-to-text model, or pass --judge-url too."
            )
        require_safetensors(self.folder)
        self.device = default_device(device)
        self.dtype = default_dtype(dtype, self.device)
        self.name = f"{self.folder.name} ({folder_fingerprint(self.folder)}, {str(self.dtype).removeprefix('torch.')})"
        self._model: Any = None

    def stop(self) -> None:
        """Nothing waits here."""

    def _load(self) -> None:
        if self._model is not None:
            return
        try:
            self._processor = pretrained("AutoProcessor", self.folder, "judge's processor")
            self._model = pretrained("AutoModelForImageTextToText", self.folder, "judge", self.device, dtype=self.dtype)
        except (ImportError, AttributeError) as error:  # transformers says either where a package is missing
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            raise ModelError(
                f"{self.folder}: the judge needs a package that is not installed here ({first[:300]}); Qwen-VL's processors "
                "need torchvision."
            ) from error

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> str:
        """As `Judge.reply`.

        Raises:
            ModelError: the folder cannot be loaded. JudgeError: the model failed on this clip.
        """
        import torch
        from PIL import Image

        self._load()
        left = iter(frames)
        told = [
            {"role": m["role"], "content": [
                {"type": "image", "image": Image.fromarray(next(left))} if p["type"] == "image" else p for p in m["content"]
            ]} for m in talk
        ]  # fmt: skip
        try:
            inputs = self._processor.apply_chat_template(
                told, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self.device, self.dtype)
            with torch.no_grad():
                made = self._model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        except (RuntimeError, ValueError, IndexError) as error:  # out of memory, a clip longer than the model reads
            raise JudgeError(f"the judge failed: {error}") from error
        return self._processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def find_judge(url: str | None, model: str | None, device: Any = None, dtype: Any = None) -> HttpJudge | LocalJudge:
    """The judge that `--judge-url` and `--judge-model` name: an endpoint where there is a URL, else a folder."""
    if not model:
        raise InputError("no judge: pass --judge-model, a model's folder, or what the server at --judge-url calls it.")
    return HttpJudge(url, model) if url else LocalJudge(model, device, dtype)
