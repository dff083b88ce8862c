"""A judge behind an OpenAI-compatible endpoint: one request a clip, a time limit on the whole of
it, the key kept to itself."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlunsplit

import numpy as np

from nexus_rt.bench.pictures import data_url
from nexus_rt.bench.vrbench.protocol import TOKENS, Protocol
from nexus_rt.bench.vrbench.replies import Reply, of_choice
from nexus_rt.core.errors import InputError, ModelError, NexusError, shorten, shown
from nexus_rt.pipeline.rewriting import split_url

KEY = "OPENAI_API_KEY"
# parameters that some servers refuse -> what they want instead; None: nothing
RENAMED = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # what another try may mend
TRIES, FIRST_WAIT, LONGEST_WAIT, TIMEOUT = 6, 1.0, 60.0, 300.0
MOST_PICTURES, MOST_REPLY = 3_800_000, 8 * 2**20  # bytes of a request's pictures, and of a reply

Conversation = list[dict[str, Any]]


class JudgeError(NexusError):
    """The judge gave no reply for one clip; another run may mend it."""

    code = "unreachable"


class JudgeUnusable(NexusError):
    """No clip can be judged: the judge cannot be reached, or refuses us."""

    code = "unreachable"


class HttpJudge:
    """`POST {url}/chat/completions`, tried again with growing waits where the server is busy or
    fails.

    Args:
        url: up to and including `/v1`, or the whole address of `chat/completions`; a query stays
            (Azure's `api-version`).
        model: what the server calls it.
        timeout: seconds for the whole of a request, from connecting to the reply's last byte.
        wait: sleeps for some seconds between tries.
        protocol: max_tokens, temperature and the size of pictures.

    The key is read from `OPENAI_API_KEY`, white space around it left out, and sent as
    `Authorization: Bearer` and, to Azure, as `api-key`; without one neither is sent. It is in no
    message. A server that knows `max_completion_tokens` instead of `max_tokens`, or no
    `temperature`, and says so, is asked so.
    """

    parallel = True

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = TIMEOUT,
        tries: int = TRIES,
        wait: Callable[[float], Any] | None = None,
        protocol: Protocol | None = None,
    ) -> None:
        parts = split_url(url)
        if parts is None:
            raise InputError(
                f"--judge-url is {shown(url, 120)}; expected http:// or https://, such as"
                " http://localhost:8000/v1.",
                param="judge_url",
            )
        path = parts.path.rstrip("/")
        path += "" if path.endswith("/chat/completions") else "/chat/completions"
        self.url = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        # without secrets
        self.shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))
        self.azure = "api-version=" in parts.query or parts.hostname.endswith(".azure.com")
        self.model, self.timeout, self.tries, self._stopped = (
            model,
            timeout,
            tries,
            threading.Event(),
        )
        self.protocol = protocol or Protocol()
        self._wait = wait or self._stopped.wait
        self.name = f"{model} at {self.shown}"
        self._key = (os.environ.get(KEY) or "").strip()
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise InputError(
                f"the key in {KEY} holds characters that no header can carry; set it again.",
                param=KEY,
            )
        self._renamed: dict[
            str, str | None
        ] = {}  # parameters as this server wants them; None: left out
        self._local, self._clients, self._lock = threading.local(), [], threading.Lock()

    def stop(self) -> None:
        """Give up what waits to be tried again, and what is on its way."""
        self._stopped.set()
        with self._lock:
            clients, self._clients = self._clients, []
        for client in clients:
            with contextlib.suppress(Exception):
                client.close()

    def _client(self) -> Any:
        try:
            import httpx2
        except ImportError as error:
            raise ModelError(
                "a judge behind --judge-url needs httpx2; pip install 'nexus-rt[vrbench]'.",
                code="missing_package",
                param="judge_url",
            ) from error
        if not hasattr(self._local, "client"):
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            if self._key and self.azure:
                headers["api-key"] = self._key
            try:
                self._local.client = httpx2.Client(headers=headers, follow_redirects=False)
            except ImportError as error:
                raise ModelError(
                    "a SOCKS proxy (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY) needs socksio; pip install"
                    " socksio, or unset the proxy.",
                    code="missing_package",
                    param="proxy",
                ) from error
            except Exception as error:  # each part of a URL has an exception of its own
                raise InputError(
                    "the proxy of ALL_PROXY, HTTP_PROXY or HTTPS_PROXY cannot be used"
                    f" ({self._said(error)}); expected such as http://proxy:3128.",
                    param="proxy",
                ) from error
            with self._lock:
                self._clients.append(self._local.client)
        return self._local.client

    def _pictures(self, frames: Sequence[np.ndarray]) -> list[str]:
        """Frames as JPEG data URLs, made smaller together until they fit a request."""
        longest = max((max(f.shape[:2]) for f in frames), default=0)
        side = self.protocol.picture_size or longest
        while True:
            scale = side / longest if longest else 1.0
            height = lambda f: None if scale >= 1 else max(1, round(f.shape[0] * scale))  # noqa: B023
            urls = [data_url(f, "JPEG", height(f)) for f in frames]
            if self.protocol.picture_size or sum(map(len, urls)) <= MOST_PICTURES or side <= 32:
                return urls
            side = int(side * 0.8)

    def _body(self, talk: Conversation, frames: Sequence[np.ndarray]) -> dict[str, Any]:
        left = iter(self._pictures(frames))
        messages = []
        for message in talk:
            parts = [
                (
                    {"type": "image_url", "image_url": {"url": next(left)}}
                    if part["type"] == "image"
                    else part
                )
                for part in message["content"]
            ]
            alone = len(parts) == 1 and parts[0]["type"] == "text"
            messages.append(
                {"role": message["role"], "content": parts[0]["text"] if alone else parts}
            )
        p = self.protocol
        return {
            "model": self.model,
            "messages": messages,
            "temperature": p.temperature,
            "max_tokens": p.max_tokens or TOKENS,
        }

    def _adapted(self, body: dict[str, Any]) -> dict[str, Any]:
        """A body with the parameters that the server has shown it wants."""
        names = {k: self._renamed.get(k, k) for k in body}
        return {names[k]: v for k, v in body.items() if names[k] is not None}

    def _learn(self, text: str, sent: dict[str, Any]) -> bool:
        """Whether a refusal names a parameter of the request that has another name or can be left
        out: the request is then sent again without it. Requests on their way when the first refusal
        came are refused as well, so what counts is what each was sent with."""
        refused = [name for name in RENAMED if name in sent and name in text]
        self._renamed.update({name: RENAMED[name] for name in refused[:1]})
        return bool(refused)

    def _post(self, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request within the time limit.

        Raises:
            TimeoutError: the limit has passed. httpx2.HTTPError: no connection.
        """
        import httpx2

        until = time.monotonic() + self.timeout
        try:
            with self._client().stream(
                "POST", self.url, json=body, timeout=httpx2.Timeout(self.timeout)
            ) as answer:
                data = bytearray()
                for piece in answer.iter_bytes():
                    data += piece
                    if time.monotonic() > until:
                        raise TimeoutError
                    if len(data) > MOST_REPLY:
                        raise JudgeError(
                            f"a reply above {MOST_REPLY >> 20} MiB, which is no judge's",
                            code="too_large",
                        )
                return answer.status_code, dict(answer.headers), bytes(data)
        except httpx2.TimeoutException:
            raise TimeoutError from None

    def _said(self, text: object) -> str:
        """Somebody's words without the key."""
        words = str(text)
        return shorten(words.replace(self._key, "***") if self._key else words, 200)

    def reply(self, talk: Conversation, frames: Sequence[np.ndarray]) -> Reply:
        """The next message of a conversation; frames: [H, W, 3] uint8 for its image parts.

        Raises:
            JudgeUnusable: no connection after all tries, or the server refuses the key, the address
                or the model.
            JudgeError: it stayed busy or failing, or answered something else than a completion.
        """
        self._client()
        body, reached, asked = self._body(talk, frames), False, None
        why, code = "nothing", "unreachable"
        turn = 0
        while turn < self.tries:
            if turn:
                self._wait(_pause(turn, asked))
            if self._stopped.is_set():
                raise JudgeError("stopped", code="cancelled")
            turn, asked = turn + 1, None
            sent = self._adapted(body)
            try:
                status, headers, data = self._post(sent)
            except TimeoutError:
                why, code, reached = f"no answer within {self.timeout:g} s", "timeout", True
                continue
            except JudgeError:
                raise
            except Exception as error:  # the client's own errors, and what a closed one raises
                if self._stopped.is_set():
                    raise JudgeError("stopped", code="cancelled") from None
                why, code = f"{type(error).__name__}: {self._said(error)}", "unreachable"
                continue
            reached, text = True, data.decode("utf-8", "replace")
            if status in (401, 403, 404):
                raise JudgeUnusable(
                    f"the judge refuses us with {status} ({self._said(text)}); check --judge-url,"
                    f" --judge-model and the key in {KEY}."
                )
            if status in PASSING:
                why, code = f"status {status}", "unreachable"
                asked = headers.get("retry-after")
                continue
            if status in (400, 422) and self._learn(text, sent):
                turn -= 1
                continue
            if not 200 <= status < 300:
                raise JudgeError(f"status {status}: {self._said(text)}")
            try:
                return of_choice(json.loads(data)["choices"][0])
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                code = "unreadable"
                why = f"a body that is no chat completion: {self._said(text)!r}"
        if not reached:
            raise JudgeUnusable(
                f"the judge at {self.shown} cannot be reached ({why}); start it, or check"
                " --judge-url."
            )
        raise JudgeError(f"{self.tries} tries failed, the last with {why}", code=code)


def _pause(turn: int, asked: str | None) -> float:
    """Seconds before a try: what the server asked for, else doubling, a random half of it so that
    threads spread out."""
    try:
        seconds = float(asked or "")
        if math.isnan(seconds):
            raise ValueError(asked)
        return min(max(seconds, 0.0), LONGEST_WAIT)
    except ValueError:
        return min(FIRST_WAIT * 2 ** (turn - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
