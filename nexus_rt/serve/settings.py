"""A server's settings, checked when they are made."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from nexus_rt.core.amounts import frame_rate, parse_bytes
from nexus_rt.core.checks import whole
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.fields import described, fields_of
from nexus_rt.core.limits import MAX_STEPS
from nexus_rt.core.size import ClipSize

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
    """What a server does beside generating; a described field is an option of `nexus-rt serve`.

    folder: of the job store and the clips.
    api_keys: of the clients, each with a queue of its own; none: whoever can connect.
    quota: bytes of all results, in equal shares of the keys; jobs that would not fit are refused.
    max_size: the largest clip, by its pixels in all.
    attempts: how often a job may take its process down before it is given up.
    lora_folder: where the LoRAs lie that requests may name.
    max_body: bytes of a request.
    warmup: one short clip before the server is ready.
    """

    folder: Path
    models: Annotated[
        tuple[str, ...],
        described(
            "a name that requests may give for the model, of which the first is answered; may be"
            " given again (default: nexus-rt)",
            flag="model_name",
            metavar="NAME",
        ),
    ] = (MODEL,)
    host: Annotated[
        str, described("address; anywhere but loopback needs an API key (default: 127.0.0.1)")
    ] = "127.0.0.1"
    port: Annotated[int, described("port", 0, 65_535)] = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_queue: Annotated[
        int,
        described(
            "jobs of one API key that wait; its next is refused with 429", 1, 10**7, metavar="N"
        ),
    ] = 1000
    deadline: Annotated[
        float,
        described(
            "seconds from a job's creation to its end, unless it says less", 0.1, 1e8, metavar="S"
        ),
    ] = 3600.0
    keep: Annotated[float, described("seconds that a result stays", 1, 1e10, metavar="S")] = (
        24 * 3600.0
    )
    quota: int = 10 * 2**30
    batch: Annotated[
        int,
        described(
            "waiting jobs of one plan, size and steps that are denoised together",
            1,
            64,
            metavar="N",
        ),
    ] = 1
    preview_every: Annotated[
        int, described("steps between previews; 0 makes none", 0, 10_000, metavar="K")
    ] = 1
    fps: Annotated[str, described("frames per second of jobs that name none (default: 16)")] = "16"
    max_size: ClipSize = ClipSize(1920, 1088, 129)  # noqa: RUF009 (a tuple)
    max_steps: Annotated[int, described("steps of a plan", 1, MAX_STEPS, metavar="N")] = 1000
    grace: Annotated[
        float,
        described(
            "seconds for a running job when the server stops, then it waits again",
            0,
            1e6,
            metavar="S",
        ),
    ] = 30.0
    attempts: int = 3
    step_timeout: Annotated[
        float | None,
        described(
            "seconds of a step after which its worker counts as hung and is begun again (default:"
            " ten times the step's price, at least 60)",
            0.1,
            1e8,
            metavar="S",
        ),
    ] = None
    lora_folder: Path | None = None
    log_prompts: Annotated[bool, described("log prompts too")] = False
    max_body: int = 2**20
    max_connections: Annotated[
        int,
        described(
            "open connections, a quarter of them kept for clients with a key",
            1,
            10**6,
            metavar="N",
        ),
    ] = 4096
    max_connections_per_address: Annotated[
        int,
        described(
            "open connections of one IPv4 address or IPv6 /64 network; 0 is without a bound",
            0,
            10**6,
            metavar="N",
        ),
    ] = 1024
    trusted_proxies: Annotated[
        tuple[str, ...],
        described(
            "address or network of a proxy, without a bound on its connections; may be given again",
            flag="trusted_proxy",
            metavar="ADDRESS",
        ),
    ] = ()
    warmup: bool = True

    def __post_init__(self) -> None:
        for name, known in fields_of(Settings).items():
            value = getattr(self, name)
            if known.low is not None and not (known.optional and value is None):
                known.checked(value)
        whole("attempts", self.attempts, 1, 100)
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise InputError(
                    f"trusted proxy {shown(proxy)} is no address; expected such as 10.0.0.5"
                    " or 10.0.0.0/24.",
                    param="trusted_proxies",
                ) from None
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

    def owner(self, api_key: str | None) -> str | None:
        """The name of an API key's queue: "" where the server has no keys, None for a wrong key.

        Digests are compared in constant time, all of them.
        """
        if not self.api_keys:
            return ""
        sent, owner = digest(api_key or ""), None
        for key in self.api_keys:
            if hmac.compare_digest(sent, digest(key)):
                owner = sent.hex()[:16]
        return owner

    def loras(self) -> list[str]:
        """Names of the LoRAs that requests may ask for."""
        if self.lora_folder is None:
            return []
        return sorted(p.stem for p in self.lora_folder.glob("*.safetensors") if p.is_file())
