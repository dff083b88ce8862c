"""A server's settings, checked when they are made."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from nexus_rt.core.amounts import parse_bytes
from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.limits import MAX_STEPS
from nexus_rt.core.size import ClipSize
from nexus_rt.media.video import frame_rate

MODEL = "nexus-rt"
MIN_KEY = 8  # characters of an API key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Settings:
    """What a server does beside generating.

    folder: of the job store and the clips. models: names that requests may give for the model, the
        first of which is answered.
    host, port: where it listens; anywhere but loopback wants `api_keys`.
    api_keys: of the clients, each with a queue of its own; none: whoever can connect.
    max_queue: jobs of one key that wait, above which its next is refused with 429.
    deadline: seconds from a job's creation to its end, unless it says less. keep: seconds that a
        result stays. quota: bytes of all results, in equal shares of the keys; jobs that would not
        fit are refused.
    batch: how many waiting jobs of the same plan, size and steps are denoised together.
    preview_every: steps between previews; 0 makes none.
    fps: of jobs whose request says nothing.
    max_size: the largest clip, by its pixels in all. max_steps: the longest plan.
    grace: seconds that a running job gets to end when the server stops, before it is queued again.
    attempts: how often a job may take its process down before it is given up.
    step_timeout: seconds of a step after which its worker counts as hung and is begun again; None
        is a multiple of the step's price (`nexus_rt.serve.watchdog`).
    lora_folder: where the LoRAs lie that requests may name.
    log_prompts: whether prompts are logged. max_body: bytes of a request.
    max_connections: in all; a quarter is kept for clients with a key. max_connections_per_address:
        of one IPv4 address or IPv6 /64 network; 0 is without a bound.
    trusted_proxies: addresses or networks that this bound leaves out.
    warmup: one short clip before the server is ready.
    """

    folder: Path
    models: tuple[str, ...] = (MODEL,)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_queue: int = 1000
    deadline: float = 3600.0
    keep: float = 24 * 3600.0
    quota: int = 10 * 2**30
    batch: int = 1
    preview_every: int = 1
    fps: str = "16"
    max_size: ClipSize = ClipSize(1920, 1088, 129)  # noqa: RUF009 (a tuple)
    max_steps: int = 1000
    grace: float = 30.0
    attempts: int = 3
    step_timeout: float | None = None
    lora_folder: Path | None = None
    log_prompts: bool = False
    max_body: int = 2**20
    max_connections: int = 4096
    max_connections_per_address: int = 1024
    trusted_proxies: tuple[str, ...] = ()
    warmup: bool = True

    def __post_init__(self) -> None:
        whole("port", self.port, 0, 65_535)
        whole("max_queue", self.max_queue, 1, 10**7)
        whole("batch", self.batch, 1, 64)
        whole("preview_every", self.preview_every, 0, 10_000)
        whole("max_steps", self.max_steps, 1, MAX_STEPS)
        whole("attempts", self.attempts, 1, 100)
        whole("max_connections", self.max_connections, 1, 10**6)
        whole("max_connections_per_address", self.max_connections_per_address, 0, 10**6)
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise InputError(
                    f"trusted proxy {shown(proxy)} is no address; expected such as 10.0.0.5"
                    " or 10.0.0.0/24.",
                    param="trusted_proxies",
                ) from None
        number("deadline", self.deadline, 0.1, 1e8)
        number("keep", self.keep, 1, 1e10)
        number("grace", self.grace, 0, 1e6)
        if self.step_timeout is not None:
            number("step_timeout", self.step_timeout, 0.1, 1e8)
        frame_rate(self.fps)
        object.__setattr__(self, "quota", parse_bytes(self.quota, "quota"))
        if not self.models or any(not re.fullmatch(r"[\w./:-]{1,200}", m) for m in self.models):
            raise InputError(
                f"model names are {self.models!r}; expected letters, digits and ._/:-, such as"
                " nexus-rt.",
                param="models",
            )
        for key in self.api_keys:
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"an API key has {len(key)} characters; expected at least {MIN_KEY} printable"
                    " ASCII characters without spaces, such as what `openssl rand -hex 24` prints.",
                    param="api_keys",
                )
        if not self.api_keys and not is_loopback(self.host):
            raise InputError(
                f"host {self.host} can be reached from other machines; pass an API key"
                " (--api-key, or NEXUS_RT_API_KEY), or listen on 127.0.0.1.",
                code="missing",
                param="api_keys",
            )
        if self.lora_folder is not None and not self.lora_folder.is_dir():
            raise InputError(
                f"lora folder {self.lora_folder} is no folder; make it first.",
                code="not_found",
                param="lora_folder",
            )

    @property
    def share(self) -> int:
        """Bytes of one key's results."""
        return self.quota // max(1, len(self.api_keys))

    def owner(self, given: str | None) -> str | None:
        """The name of an API key's queue: "" where the server has no keys, None for a wrong key.

        Digests are compared in constant time, all of them.
        """
        if not self.api_keys:
            return ""
        asked, owner = digest(given or ""), None
        for key in self.api_keys:
            if hmac.compare_digest(asked, digest(key)):
                owner = asked.hex()[:16]
        return owner

    def loras(self) -> list[str]:
        """Names of the LoRAs that requests may ask for."""
        if self.lora_folder is None:
            return []
        return sorted(p.stem for p in self.lora_folder.glob("*.safetensors") if p.is_file())
