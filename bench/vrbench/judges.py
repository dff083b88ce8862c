"""What answers a clip's questions: an OpenAI-compatible endpoint, or a transformers
image-text-to-text model in this process.

Both take a conversation: `[{"role", "content": [{"type": "text", "text"} | {"type": "image"}]}]`,
whose image parts stand for the clip's frames in their order, and return the reply's text.
Temperature 0, 1,024 new tokens, as published for Qwen3-VL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nexus_rt.bench.pictures import data_url
from nexus_rt.bench.vrbench import protocol as how
from nexus_rt.bench.vrbench.protocol import STRICT, TOKENS
from nexus_rt.core.chat import ChatClient, ChatError, Reply
from nexus_rt.core.errors import InputError, ModelError, NexusError, shorten
from nexus_rt.core.paths import as_path
from nexus_rt.loading.locate import folder_fingerprint, require_safetensors
from nexus_rt.loading.pretrained import pretrained
from nexus_rt.pipeline.assemble import default_device, default_dtype

KEY = "OPENAI_API_KEY"
TRIES, TIMEOUT = 6, 300.0  # of a request; seconds
MAX_PICTURES = 3_800_000  # bytes of a request's pictures
MIN_SIDE = 32  # pixels of a picture's longest side that bytes may cost

Conversation = list[dict[str, Any]]


class JudgeError(NexusError):
    """The judge gave no reply for one clip; another run may mend it."""

    code = "unreachable"


class Judge(Protocol):
    """name: what makes its answers its own; parallel: whether `reply` may be called from several
    threads; stop: give up what waits to be tried again."""

    name: str
    parallel: bool

    def stop(self) -> None: ...

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> Reply:
        """The next message of a conversation; frames: [H, W, 3] uint8 for its image parts."""
        ...


class HttpJudge:
    """An OpenAI-compatible endpoint, as `ChatClient`: one request a clip.

    Args:
        url: up to and including `/v1`, or the whole address of `chat/completions`.
        model: what the server calls it.
        timeout: seconds for the whole of a request.
        wait: sleeps for some seconds between tries.
        protocol: max_tokens, temperature and the size of pictures.

    The key is read from `OPENAI_API_KEY`.
    """

    parallel = True

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = TIMEOUT,
        tries: int = TRIES,
        wait: Callable[[float], Any] | None = None,
        protocol: how.Protocol = STRICT,
    ) -> None:
        key = os.environ.get(KEY)
        self.client = ChatClient(url, key, timeout, tries, wait, "--judge-url", KEY)
        self.model, self.protocol = model, protocol
        self.name = f"{model} at {self.client.address}"
        self.stop = self.client.stop

    def _pictures(self, frames: Sequence[np.ndarray]) -> list[str]:
        """Frames as JPEG data URLs, made smaller together until they fit a request."""
        longest = max((max(f.shape[:2]) for f in frames), default=0)
        side = self.protocol.picture_size or longest
        while True:
            heights = [
                None if side >= longest else max(1, round(f.shape[0] * (side / longest)))
                for f in frames
            ]
            urls = [data_url(f, "JPEG", h) for f, h in zip(frames, heights, strict=True)]
            fits = sum(map(len, urls)) <= MAX_PICTURES or side <= MIN_SIDE
            if self.protocol.picture_size or fits:
                return urls
            side = int(side * 0.8)

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> Reply:
        """As `Judge.reply`.

        Raises:
            ChatUnavailable: no clip can be judged. JudgeError: no reply for this one.
        """
        urls = iter(self._pictures(frames))
        part = lambda p: (
            {"type": "image_url", "image_url": {"url": next(urls)}} if p["type"] == "image" else p
        )
        messages = []
        for message in talk:
            parts = [part(p) for p in message["content"]]
            alone = len(parts) == 1 and parts[0]["type"] == "text"
            messages.append(
                {"role": message["role"], "content": parts[0]["text"] if alone else parts}
            )
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.protocol.temperature,
            "max_tokens": self.protocol.max_tokens or TOKENS,
        }
        try:
            return self.client.reply(body)
        except ChatError as error:
            raise JudgeError(str(error), code=error.code) from error


class LocalJudge:
    """A transformers image-text-to-text model (Qwen3-VL is the published one), read when first
    asked, greedy.

    Args:
        folder: of `save_pretrained`: model in safetensors, processor, chat template.
    """

    parallel = False

    def __init__(
        self,
        folder: str | Path,
        device: Any = None,
        dtype: Any = None,
        protocol: how.Protocol = STRICT,
    ) -> None:
        self.folder, self.protocol = as_path("folder", folder), protocol
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"{folder} holds no config.json; expected a folder with an image-text-to-text"
                " model, or pass --judge-url too.",
                code="not_found",
                param="judge_model",
            )
        require_safetensors(self.folder)
        self.device = default_device(device)
        self.dtype = default_dtype(dtype, self.device)
        self.name = (
            f"{self.folder.name} ({folder_fingerprint(self.folder)},"
            f" {str(self.dtype).removeprefix('torch.')})"
        )
        self._model: Any = None

    def stop(self) -> None:
        """Nothing waits here."""

    def _load(self) -> None:
        if self._model is not None:
            return
        try:
            self._processor = pretrained("AutoProcessor", self.folder, "judge's processor")
            self._model = pretrained(
                "AutoModelForImageTextToText", self.folder, "judge", self.device, dtype=self.dtype
            )
        except (
            ImportError,
            AttributeError,
            ModelError,
        ) as error:  # transformers says any where a package is missing
            if isinstance(error, ModelError) and not isinstance(error.__cause__, AttributeError):
                raise
            first = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), "no message"
            )
            raise ModelError(
                f"{self.folder}: the judge needs a package that is not installed here"
                f" ({first[:300]}); Qwen-VL's processors need torchvision.",
                code="missing_package",
            ) from error

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> Reply:
        """As `Judge.reply`.

        Raises:
            ModelError: the folder cannot be loaded. JudgeError: the model failed on this clip.
        """
        import torch
        from PIL import Image

        self._load()
        left = iter(_sized(Image.fromarray(f), self.protocol.picture_size) for f in frames)
        messages = [
            {
                "role": m["role"],
                "content": [
                    {"type": "image", "image": next(left)} if p["type"] == "image" else p
                    for p in m["content"]
                ],
            }
            for m in talk
        ]
        try:
            inputs = self._processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.device, self.dtype)
            with torch.no_grad():
                heat = self.protocol.temperature
                sampled = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
                most = self.protocol.max_tokens or TOKENS
                made = self._model.generate(**inputs, max_new_tokens=most, **sampled)
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ) as error:  # out of memory, a clip longer than the model reads
            raise JudgeError(f"the judge failed: {shorten(error)}", code="failed") from error
        new = made[:, inputs["input_ids"].shape[1] :]
        text = self._processor.batch_decode(new, skip_special_tokens=True)[0]
        return Reply(text, "length" if new.shape[1] >= most else "stop")


def _sized(image: Any, side: int | None) -> Any:
    """An image whose longest side is at most `side`."""
    scale = 1.0 if side is None else side / max(image.size)
    return (
        image if scale >= 1 else image.resize(tuple(max(1, round(n * scale)) for n in image.size))
    )


def find_judge(
    url: str | None,
    model: str | None,
    device: Any = None,
    dtype: Any = None,
    protocol: how.Protocol = STRICT,
) -> HttpJudge | LocalJudge:
    """The judge that `--judge-url` and `--judge-model` name: an endpoint where there is a URL, else
    a folder."""
    if not model:
        raise InputError(
            "no judge: pass --judge-model, a model's folder, or what the server at --judge-url"
            " calls it.",
            code="missing",
            param="judge_model",
        )
    if url and (device or dtype):
        raise InputError(
            "--device and --dtype are of a judge that runs here; leave them out with --judge-url.",
            code="conflict",
            param="judge_url",
        )
    return (
        HttpJudge(url, model, protocol=protocol)
        if url
        else LocalJudge(model, device, dtype, protocol)
    )
