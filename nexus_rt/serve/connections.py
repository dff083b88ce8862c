"""Bounds of connections: time and bytes of a request's head, connections of an address and in all.

Every connection waits until the head of a request with a valid API key has come (on a server
without keys: any head). Where connections are too many, those that wait are closed, oldest first; a
share is kept for the others, so that a client with the key always gets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

from nexus_rt.serve.access import bearer
from nexus_rt.serve.problems import Problem
from nexus_rt.serve.settings import Settings

log = logging.getLogger("nexus_rt.serve")
HEAD_SECONDS = 10.0  # from the connection, or a later request's first byte, to the head's end
BODY_SECONDS = 65.0  # above `bodies.SECONDS`, whose answer comes first
LINGER_SECONDS = 2.0  # in which a refused client reads why; what it sends is dropped
FLUSH_SECONDS = 60.0  # for a closed connection's last bytes
MAX_HEAD = 64 * 2**10  # bytes of a request line and its headers
ACCEPT_BURST = 16  # connections accepted before the open ones are read again
SPARE_FILES = 128  # descriptors for the store, the workers' pipes and connections being accepted
MIN_CONNECTIONS = 16
LOG_SECONDS = 60.0  # between two lines about closed connections
REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def room_for_connections() -> int:
    """Connections that the limit of file descriptors leaves room for: a socket each, and the clip
    that it downloads."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**31
    return max(MIN_CONNECTIONS, (soft - SPARE_FILES) // 2)


def client_address(host: str) -> Address:
    """A client's address; IPv4 inside IPv6 is IPv4.

    Raises:
        ValueError: no internet address.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def client_network(address: Address) -> Any:
    """What counts as one address: an IPv4 address, or the 64 bits of IPv6 that one client gets."""
    bits = 32 if address.version == 4 else 64
    return ipaddress.ip_network((address, bits), strict=False)


class Connections:
    """A server's open connections.

    most: of all. open_to_all: those that may wait for a key; the rest is kept for clients with one.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.most = min(settings.max_connections, room_for_connections())
        self.open_to_all = self.most - self.most // 4
        self.most_known = max(1, self.most - max(1, self.most // 16))
        self.trusted = [ipaddress.ip_network(t, strict=False) for t in settings.trusted_proxies]
        self.waiting: dict[Any, None] = {}  # oldest first
        self.known: dict[Any, None] = {}
        self.groups: dict[Any, dict[Any, None]] = {}  # by address
        self.closed, self.logged = 0, -LOG_SECONDS

    def add(self, connection: Any) -> None:
        """A new connection; where there are too many, another one is closed, or itself."""
        self.waiting[connection] = None
        if connection.address is not None:
            group = self.groups.setdefault(client_network(connection.address), {})
            group[connection] = None
            bound = self._bound(connection.address)
            if bound is not None and len(group) > bound:
                self._close_one(group, connection)
        if len(self.waiting) > self.open_to_all:
            self._close_one(self.waiting, connection)
        elif len(self.waiting) + len(self.known) > self.most:
            self._close_one({**self.waiting, **self.known}, connection)

    def remove(self, connection: Any) -> None:
        """A connection that is closed."""
        self.waiting.pop(connection, None)
        self.known.pop(connection, None)
        if connection.address is None:
            return
        network = client_network(connection.address)
        group = self.groups.get(network, {})
        group.pop(connection, None)
        if not group:
            self.groups.pop(network, None)

    def admit(self, connection: Any, authorization: str) -> bool:
        """Whether a request is served; what it shows of its client decides what the connection
        counts as."""
        known = self.settings.owner(bearer(authorization)) is not None
        if connection not in self.waiting and connection not in self.known:
            return True  # closed meanwhile
        if known and connection not in self.known and len(self.known) >= self.most_known:
            return False
        if known:
            self.waiting.pop(connection, None)
            self.known[connection] = None
        elif connection in self.known:
            del self.known[connection]
            self.waiting[connection] = None
        return True

    def _bound(self, address: Address) -> int | None:
        """Connections that an address may have."""
        trusted = any(address in t for t in self.trusted if t.version == address.version)
        return None if trusted else self.settings.max_connections_per_address or None

    def _close_one(self, group: Mapping[Any, None], newest: Any) -> None:
        """Close the oldest that waits, else the oldest idle one, else the newest."""
        waits = (c for c in group if c in self.waiting and c is not newest)
        victim = next(waits, None) or next((c for c in group if c.idle), newest)
        self.remove(victim)
        victim.close_for_room(victim is newest)
        self.closed += 1
        if time.monotonic() - self.logged > LOG_SECONDS:
            log.warning("connections were closed for room", extra={"count": self.closed})
            self.closed, self.logged = 0, time.monotonic()


class Bounded:
    """What uvicorn's two HTTP protocols lack, mixed into either."""

    table: Connections
    # uvicorn's
    transport: Any
    cycle: Any
    client: Any
    timeout_keep_alive: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        inner = self.app  # type: ignore[has-type]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            fields = (value for name, value in scope["headers"] if name == b"authorization")
            if self.table.admit(self, next(fields, b"").decode("latin-1")):
                return await inner(scope, receive, send)
            problem = Problem(
                503, "too_many_connections", "the server has no room for more connections.",
                retry_after=5, headers={"Connection": "close"},
            )  # fmt: skip
            return await problem.response()(scope, receive, send)

        self.app = app
        self.address: Address | None = None
        self.refused = False
        self._unparsed = 0  # bytes since a head, a piece of a body or a message was complete
        self._phase: Any = None
        self._timer: asyncio.TimerHandle | None = None

    # --- the two parsers' own ---

    def _in_head(self) -> bool:
        """Whether the next byte is of a head."""
        raise NotImplementedError

    def _in_body(self) -> bool:
        """Whether the body of the request that is served has not come yet."""
        raise NotImplementedError

    def _progress(self) -> Any:
        """What changes when a head, a piece of a body or a message is complete."""
        raise NotImplementedError

    def _begun(self) -> int:
        """Above 0 where some of the next head has come."""
        raise NotImplementedError

    # --- asyncio's ---

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        if self.client:
            with contextlib.suppress(ValueError):  # no internet address
                self.address = client_address(self.client[0])
        self._watch()
        self.table.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self.table.remove(self)
        super().connection_lost(error)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        """Feed the parser no more at once than a head may have."""
        at = 0
        while at < len(data) and not self.refused and not self.transport.is_closing():
            piece = data[at : at + max(1, MAX_HEAD + 1 - self._unparsed)]
            at += len(piece)
            before = self._progress()
            super().data_received(piece)  # type: ignore[misc]
            if self.refused or self.transport.is_closing():
                return
            progress = self._progress() != before
            self._unparsed = self._begun() if progress else self._unparsed + len(piece)
            self._check_head()
        if not self.refused:
            self._watch()

    # --- uvicorn's ---

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if not self.refused and not self.transport.is_closing():
            if self._in_head() and not self._unparsed:
                self._unparsed = self._begun()
                self._check_head()
            if not self.refused:
                self._watch()

    def send_400_response(self, message: str) -> None:
        self._refuse(400, "invalid_request", "the request is no HTTP/1.1.")

    def shutdown(self) -> None:
        if self.refused:
            self.transport.abort()
        else:
            super().shutdown()  # type: ignore[misc]

    # --- the bounds ---

    @property
    def running(self) -> bool:
        """A response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def idle(self) -> bool:
        """Between two requests."""
        return self._phase is not None and self._phase[0] == "idle"

    def _check_head(self) -> None:
        if self._unparsed > MAX_HEAD:
            self._refuse(
                431, "head_too_large", f"the request's head has more than {MAX_HEAD} bytes."
            )

    def _watch(self) -> None:
        """The timer of what the connection waits for, begun once a phase."""
        if self._in_body():
            name, seconds = "body", BODY_SECONDS
        elif self.running:
            name, seconds = "running", None
        elif self._unparsed or self.cycle is None:
            name, seconds = "head", HEAD_SECONDS
        else:
            name, seconds = "idle", self.timeout_keep_alive
        if self._phase is not None and self._phase == (name, self.cycle):
            return
        self._phase = (name, self.cycle)
        self._stop_timer()
        if seconds is not None:
            self._start_timer(seconds, self._expire)

    def _start_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        """Close; a client that does not read the rest of its answer loses it."""
        self.transport.close()
        self._start_timer(FLUSH_SECONDS, self.transport.abort)

    def close_for_room(self, newest: bool) -> None:
        """Close at once; the newest is given a reason."""
        if newest:
            self.transport.write(_answer(503, "too_many_connections", "too many connections."))
            self.transport.close()
        else:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer a request that cannot be parsed, and close once the client has had time to read:
        a socket that is closed with bytes unread is reset, and the answer lost."""
        self.refused = True
        self._stop_timer()
        if self.running or self.transport.is_closing():
            self.transport.abort()
            return
        self.transport.write(_answer(status, code, message))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_timer(LINGER_SECONDS, self.transport.abort)


def _answer(status: int, code: str, message: str) -> bytes:
    body = json.dumps(Problem(status, code, message).body).encode()
    return (
        f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body


class BoundedHttpTools(Bounded):
    """Mixed into uvicorn's protocol on httptools."""

    pipeline: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._part, self._count, self._head_begun = "head", 0, False

    def on_message_begin(self) -> None:
        self._head_begun = True
        super().on_message_begin()  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        self._part, self._head_begun = "body", False
        self._count += 1
        super().on_headers_complete()  # type: ignore[misc]

    def on_body(self, body: bytes) -> None:
        self._count += 1
        super().on_body(body)  # type: ignore[misc]

    def on_message_complete(self) -> None:
        self._part = "head"
        self._count += 1
        super().on_message_complete()  # type: ignore[misc]

    def _in_head(self) -> bool:
        return self._part == "head"

    def _in_body(self) -> bool:
        return self._part == "body" and not self.pipeline  # else nothing is read

    def _progress(self) -> int:
        return self._count

    def _begun(self) -> int:
        return int(self._head_begun)


class BoundedH11(Bounded):
    """Mixed into uvicorn's protocol on h11."""

    conn: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        import h11

        super().__init__(*args, **options)
        self._h11 = h11
        # above our bound, which answers; h11's own bounds trailers
        self.conn = h11.Connection(h11.SERVER, 2 * MAX_HEAD)

    def _in_head(self) -> bool:
        return self.conn.their_state is self._h11.IDLE

    def _in_body(self) -> bool:
        return self.conn.their_state is self._h11.SEND_BODY

    def _progress(self) -> Any:
        return (self.cycle, True) if self._in_head() else object()

    def _begun(self) -> int:
        return len(self.conn.trailing_data[0]) if self._in_head() else 0


def bounded_protocol(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, on httptools where it is installed, else on h11, with the bounds of
    a server's settings; a class of its own for each server, whose connections it counts."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol
    mixin = BoundedHttpTools if hasattr(base, "on_headers_complete") else BoundedH11
    return type("BoundedProtocol", (mixin, base), {"table": Connections(settings)})
