"""The client of OpenAI-compatible chat endpoints: address, key, proxy, time limit, tries, bounds,
errors and cancel, for everything here that asks a model over HTTP.

It is of the standard library: a rewriter needs no extra.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit
from urllib.request import (
    BaseHandler,
    HTTPRedirectHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

from nexus_rt.core.deadline import begin, result_within
from nexus_rt.core.errors import InputError, ModelError, NexusError, is_text, shorten, shown

MAX_REPLY = 8 << 20  # bytes
FIRST_WAIT, MAX_WAIT = 1.0, 60.0  # seconds between tries
MAX_WORDS = 200  # characters of a server's words in an error
REFUSED = (401, 403, 404)  # statuses of a wrong key, address or model
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that another try may mend
# parameters that some servers refuse -> their other name; None: left out
RENAMED = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}
PROXIES = ("all", "http", "https")  # variables of the environment, before "_proxy"
SOCKS = ("socks5", "socks5h")


class ChatError(NexusError):
    """One request got no reply; another may get one."""

    code = "unreachable"


class ChatUnavailable(NexusError):
    """No request can get a reply: the endpoint cannot be reached, or refuses the key, the address
    or the model."""

    code = "unreachable"


@dataclass(frozen=True)
class Reply:
    """A chat model's message. finish: the server's finish_reason; reasoning: it reasoned and wrote
    no content; refusal: the text is a refusal."""

    text: str
    finish: str | None = None
    reasoning: bool = False
    refusal: bool = False


def of_choice(choice: dict[str, Any]) -> Reply:
    """The reply in a chat completion's choice: content as text or as parts, which may be null.

    Raises:
        KeyError, TypeError, AttributeError: it is no choice.
    """
    message = choice["message"]
    content, finish = message.get("content"), choice.get("finish_reason")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        content = "".join(p for p in parts if isinstance(p, str))
    reasons = (message.get(k) for k in ("reasoning_content", "reasoning"))
    refusal = message.get("refusal")
    refused = not content and isinstance(refusal, str) and bool(refusal)
    text = refusal if refused else content
    return Reply(
        text if isinstance(text, str) else "",
        finish if isinstance(finish, str) else None,
        any(isinstance(r, str) and r.strip() for r in reasons),
        refused,
    )


def split_url(url: str, schemes: tuple[str, ...] = ("http", "https")) -> SplitResult | None:
    """The parts of a URL of one of some schemes; None where it is none."""
    try:
        parts = urlsplit(url.strip())
        fits = parts.scheme in schemes and bool(_ascii(parts.hostname or "")) and parts.port != 0
        return parts if fits and is_text(url) and url.strip().isprintable() else None
    except (ValueError, AttributeError):  # of brackets, the port, the name; no text at all
        return None


def _ascii(host: str) -> str:
    """A host's name as a connection and a header take it."""
    return host if host.isascii() else host.encode("idna").decode()


class ChatClient:
    """`POST {url}/chat/completions`, from several threads at once.

    Args:
        url: up to and including `/v1`, or the whole address of `chat/completions`; a query stays
            (Azure's `api-version`), a user and password become basic authentication.
        key: sent as `Authorization: Bearer` and, to Azure, as `api-key`, white space around it left
            out; in no message. None or empty: none is sent.
        timeout: seconds for the whole of a request, from connecting to the reply's last byte.
        tries: of a request, where the server is busy or fails, with growing waits.
        wait: sleeps for some seconds between tries.
        name, key_name: of the URL and of the key, for errors.

    Proxies are the environment's. A redirect is not followed: the key goes nowhere else.

    Raises:
        InputError: no http or https URL, or a key that no header can carry.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout: float,
        tries: int = 1,
        wait: Callable[[float], Any] | None = None,
        name: str = "url",
        key_name: str = "the key",
    ) -> None:
        if (parts := split_url(url)) is None:
            raise InputError(
                f"{name} is {shown(url, 120)}; expected http:// or https://, such as"
                " http://localhost:8000/v1.",
                param=name.lstrip("-").replace("-", "_"),
            )
        self._key = (key or "").strip()
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise InputError(
                f"{key_name} holds characters that no header can carry; set it again.",
                param=key_name,
            )
        self.timeout, self.tries, self.name, self.key_name = timeout, tries, name, key_name
        user, _, self.host = parts.netloc.rpartition("@")  # host: without secrets
        path = parts.path.rstrip("/")
        path += "" if path.endswith("/chat/completions") else "/chat/completions"
        self.scheme, self.address = (
            parts.scheme,
            urlunsplit((parts.scheme, self.host, path, "", "")),
        )
        path, query = (quote(part, safe="/%:@!$&'()*+,;=~?") for part in (path, parts.query))
        self._url = urlunsplit((parts.scheme, _ascii(self.host), path, query, ""))
        self._headers = {"Content-Type": "application/json", "User-Agent": "nexus-rt"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
            if "api-version=" in parts.query or (parts.hostname or "").endswith(".azure.com"):
                self._headers["api-key"] = self._key
        if user:
            basic = base64.b64encode(unquote(user).encode()).decode()
            self._headers["Authorization"] = f"Basic {basic}"
        self._renamed: dict[str, str | None] = {}  # parameters as this server takes them
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._on_way: set[Future[Any]] = set()
        self._wait = wait or self._stopped.wait

    def stop(self) -> None:
        """Give up what waits to be tried again, and what is on its way."""
        self._stopped.set()
        with self._lock:
            for future in self._on_way:
                future.cancel()

    def reply(self, body: dict[str, Any]) -> Reply:
        """The reply to a request with these fields. A server that knows `max_completion_tokens`
        instead of `max_tokens`, or no `temperature`, and names it in its refusal, gets that.

        Raises:
            ChatUnavailable: no connection after all tries, or the server refuses the key, the
                address or the model.
            ChatError: the server stayed busy or failing, or answered something else than a
                completion; or `stop`.
            InputError, ModelError: the environment's proxy cannot be used.
        """
        opener, reached, turn, pause = self._opener(), False, 0, None
        while turn < self.tries:
            if turn:
                self._wait(_seconds(turn, pause))
            if self._stopped.is_set():
                raise ChatError("stopped", code="cancelled")
            turn, pause = turn + 1, None
            sent = self._adapted(body)
            try:
                status, headers, data = self._exchange(opener, sent)
            except TimeoutError:
                why, code, reached = f"no answer within {self.timeout:g} s", "timeout", True
                continue
            except CancelledError:
                raise ChatError("stopped", code="cancelled") from None
            except (OSError, HTTPException, ValueError) as error:
                why, code = f"{type(error).__name__}: {self._words(error)}", "unreachable"
                continue
            reached, text = True, data.decode("utf-8", "replace")
            if status in REFUSED:
                raise ChatUnavailable(
                    f"{self.address} refuses with status {status} ({self._words(text)}); check"
                    f" {self.name}, the model's name and {self.key_name}."
                )
            if status in PASSING:
                why, code, pause = f"status {status}", "unreachable", headers.get("Retry-After")
                continue
            if status in (400, 422) and self._learn(text, sent):
                turn -= 1
                continue
            if not 200 <= status < 300:
                raise ChatError(f"status {status}: {self._words(text)}")
            try:
                return of_choice(json.loads(data)["choices"][0])
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                why, code = f"a body that is no completion: {self._words(text)!r}", "unreadable"
        if not reached:
            raise ChatUnavailable(
                f"{self.address} cannot be reached ({why}); start the server, or check {self.name}."
            )
        tries = f"{self.tries} tries failed, the last with " if self.tries > 1 else ""
        raise ChatError(tries + why, code=code)

    def _adapted(self, body: dict[str, Any]) -> dict[str, Any]:
        """A body with the parameters that the server takes."""
        names = {k: self._renamed.get(k, k) for k in body}
        return {name: body[k] for k, name in names.items() if name is not None}

    def _learn(self, text: str, sent: dict[str, Any]) -> bool:
        """Whether a refusal names a parameter of the request that has another name or can be left
        out: the request is then sent again without it. Requests on their way when the first refusal
        came are refused as well, so what counts is what each was sent with."""
        refused = [name for name in RENAMED if name in sent and name in text]
        self._renamed.update({name: RENAMED[name] for name in refused[:1]})
        return bool(refused)

    def _exchange(self, opener: OpenerDirector, body: dict[str, Any]) -> tuple[int, Message, bytes]:
        """Status, headers and body of one request within the time limit.

        Raises:
            TimeoutError: the limit has passed. CancelledError: `stop`. ChatError: the reply is too
                large. OSError, HTTPException, ValueError: no connection.
        """
        future = begin(lambda: self._send(opener, json.dumps(body).encode()))
        with self._lock:
            self._on_way.add(future)
            if self._stopped.is_set():
                future.cancel()
        try:
            return result_within(future, self.timeout)
        finally:
            with self._lock:
                self._on_way.discard(future)

    def _send(self, opener: OpenerDirector, data: bytes) -> tuple[int, Message, bytes]:
        """As `_exchange`; the limit is of each wait for the server, and ends a reply that drips."""
        until = time.monotonic() + self.timeout
        try:
            answer = opener.open(Request(self._url, data, self._headers), timeout=self.timeout)
        except HTTPError as error:  # a status that is none of success is an answer too
            answer = error
        except URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else error from None
        received = bytearray()
        with answer:
            while piece := answer.read1(1 << 16):
                received += piece
                if time.monotonic() > until:
                    raise TimeoutError
                if len(received) > MAX_REPLY:
                    raise ChatError(
                        f"a reply above {MAX_REPLY >> 20} MiB, which is no chat model's",
                        code="too_large",
                    )
            return answer.status, answer.headers, bytes(received)

    def _words(self, text: object) -> str:
        """Somebody's words without the key."""
        words = str(text)
        return shorten(words.replace(self._key, "***") if self._key else words, MAX_WORDS)

    def _opener(self) -> OpenerDirector:
        """What opens a connection, by the environment's proxy where it has one for this host.

        Raises:
            InputError, ModelError: a proxy that cannot be used.
        """
        known: dict[str, SplitResult] = {}
        for name, url in () if proxy_bypass(self.host) else getproxies().items():
            if name not in PROXIES or not url:
                continue
            parts = split_url(url if "://" in url else f"http://{url}", ("http", "https", *SOCKS))
            if parts is None:
                raise InputError(
                    f"the proxy of {name.upper()}_PROXY cannot be used; expected such as"
                    " http://proxy:3128.",
                    param="proxy",
                )
            known[name] = parts
        if any(parts.scheme in SOCKS for parts in known.values()):
            try:
                import socks
                from sockshandler import SocksiPyHandler
            except ImportError as error:
                raise ModelError(
                    "a SOCKS proxy (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY) needs PySocks; pip install"
                    " PySocks, or unset the proxy.",
                    code="missing_package",
                    param="proxy",
                ) from error
        proxy = known.get(self.scheme) or known.get("all")
        handlers: list[BaseHandler] = [_NoRedirect(), ProxyHandler({})]
        if proxy is not None and proxy.scheme in SOCKS:
            user, password = (p and unquote(p) for p in (proxy.username, proxy.password))
            place = proxy.hostname, proxy.port or 1080
            handlers.append(SocksiPyHandler(socks.SOCKS5, *place, True, user, password))
        elif proxy is not None:
            handlers[1] = ProxyHandler({self.scheme: proxy.geturl()})
        return build_opener(*handlers)


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is a status like another."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _seconds(turn: int, pause: str | None) -> float:
    """Seconds before a try: what the server's Retry-After has, else doubling, a random half of it
    so that threads spread out."""
    with contextlib.suppress(ValueError):
        seconds = float(pause or "")
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), MAX_WAIT)
    return min(FIRST_WAIT * 2 ** (turn - 1), MAX_WAIT) * random.uniform(0.5, 1.0)
