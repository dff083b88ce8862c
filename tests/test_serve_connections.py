"""A client without a key locks nobody out: slow heads and bodies, long heads, many connections."""

import contextlib
import importlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nexus_rt.core.errors import InputError
from nexus_rt.serve import connections
from nexus_rt.serve.connections import MAX_HEAD, Connections, client_address
from nexus_rt.serve.settings import Settings
from tests.refusals import refuses
from tests.serving import ask, client, fake, wait_for

KEY = "a-long-key-1"
BEARER = {"Authorization": f"Bearer {KEY}"}
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PARSERS = ["h11_impl.H11Protocol", "httptools_impl.HttpToolsProtocol"]


@pytest.fixture(params=PARSERS)
def parser(request, monkeypatch):
    """Each of uvicorn's protocols in turn."""
    module, _, name = request.param.partition(".")
    protocol = getattr(importlib.import_module(f"uvicorn.protocols.http.{module}"), name)
    monkeypatch.setattr("uvicorn.protocols.http.auto.AutoHTTPProtocol", protocol)


@pytest.fixture
def many_files():
    """As many descriptors as may be."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def opened(address, *words):
    """A connection on which something was sent."""
    made = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10)
    for piece in words:
        made.sendall(piece)
    return made


def answer(sock, seconds=10.0):
    """What comes until the server closes the connection."""
    sock.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65_536):
            data += piece
    return data


def one_answer(sock):
    """What comes until one answer is whole, or the connection is closed."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65_536):
            data += piece
            head, end, text = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if end and length and len(text) >= int(length[1]) and b" 100 " not in head[:20]:
                break
    return data


def is_open(sock):
    """Whether the server has not closed a connection on which nothing is to be read."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(0):
        return True
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def slowly(sock, piece, every, seconds=10.0):
    """Send again and again; how long the server took it."""
    began = time.monotonic()
    while time.monotonic() - began < seconds and is_open(sock):
        try:
            sock.sendall(piece)
        except OSError:
            break
        time.sleep(every)
    return time.monotonic() - began


@pytest.mark.parametrize(
    "begin, piece",
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"G", b"E"),
        (HEAD, b"X-Slow: 1\r\n"),
        (HEAD + b"X: ", b"x"),
        (HEAD + b"\r\n", b"\r\n"),
        (HEAD + b"\r\n", b"GET"),
        (HEAD + b"\r\n" + HEAD, b"X: 1\r\n"),
    ],
)
def test_a_head_that_does_not_end_is_dropped(tmp_path, monkeypatch, parser, begin, piece):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.15)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.15)
    with fake(tmp_path, api_keys=(KEY,)) as (address, _, _), opened(address, begin) as slow:
        whole = begin.count(b"\r\n\r\n")
        if whole:
            assert one_answer(slow).startswith(b"HTTP/1.1 200")
        took = slowly(slow, piece, 0.03)
        assert took < 3, "the connection is still open"
        assert b"HTTP/1.1 200" not in answer(slow)


@pytest.mark.parametrize(
    "head",
    [
        POST + b"Content-Length: 1000\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n",
        HEAD + b"Content-Length: 1000\r\n\r\n",
        HEAD.replace(b"/health", b"/absent") + b"Content-Length: 1000\r\n\r\n",
    ],
)
def test_a_body_that_does_not_end_is_dropped_whoever_answers(tmp_path, monkeypatch, parser, head):
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.15)
    with fake(tmp_path) as (address, _, _), opened(address, head) as slow:
        assert slowly(slow, b"x", 0.03) < 3, "the connection is still open"


def test_a_slow_body_of_a_client_with_a_key_is_read(tmp_path, parser):
    body = json.dumps({"prompt": "x"}).encode()
    head = POST + f"Authorization: Bearer {KEY}\r\nConnection: close\r\n".encode()
    with fake(tmp_path, api_keys=(KEY,)) as (address, server, _):
        with opened(address, head + f"Content-Length: {len(body)}\r\n\r\n".encode()) as slow:
            for i in range(len(body)):
                slow.sendall(body[i : i + 1])
                time.sleep(0.01)
            assert answer(slow).startswith(b"HTTP/1.1 200")
        assert sum(server.dispatcher.store.counts().values()) == 1


def test_heads_up_to_the_bound_are_read_and_above_are_431(tmp_path, parser):
    start, end = HEAD + b"Connection: close\r\nX-Long: ", b"\r\n\r\n"
    room = MAX_HEAD - len(start) - len(end)
    with fake(tmp_path) as (address, _, _):
        for size, status in ((room, 200), (room + 2, 431), (3 * MAX_HEAD, 431)):
            with opened(address, start + b"x" * size + end) as one:
                got = answer(one)
                assert got.startswith(f"HTTP/1.1 {status} ".encode()), (size, got[:100])
        error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "head_too_large" and str(MAX_HEAD) in error["message"]
        many = b"".join(b"X-%d: y\r\n" % i for i in range(10_000))
        for head in (HEAD + many, b"GET /" + b"x" * 100_000, b"\r\n" * 50_000, b"GET /?" + many):
            with opened(address, head) as one:
                assert answer(one).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")), head[:20]


def test_a_head_of_71_megabytes_costs_no_memory(tmp_path, parser):
    status = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    with fake(tmp_path) as (address, _, _), opened(address, HEAD + b"X-Long: ") as one:
        piece, before, sent = b"x" * 2**20, status(), 0
        with contextlib.suppress(OSError):
            for _ in range(71):
                one.sendall(piece)
                sent += 1
                assert status() - before < 16 * 2**20
        assert answer(one).startswith(b"HTTP/1.1 431")
        assert ask(address, "/health")[0] == 200


def test_what_follows_a_body_is_bounded_too(tmp_path, parser):
    """Trailers and chunks' extensions."""
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    for words in (b"0\r\n" + b"X-Trailer: " + b"x" * 10**6, b"1;" + b"x" * 10**6):
        folder = tmp_path / str(len(words))
        with fake(folder) as (address, _, _), opened(address, head) as one:
            with contextlib.suppress(OSError):
                one.sendall(words)
            answer(one, 5.0)  # a time-out, were it still open


def test_what_is_no_request_is_answered_in_json(tmp_path, parser):
    with fake(tmp_path) as (address, _, _):
        for words in (b"\x16\x03\x01 hello\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/x\r\n\r\n"):
            with opened(address, words) as one:
                got = answer(one)
                assert got.startswith(b"HTTP/1.1 400"), words
                assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"]


@pytest.mark.parametrize(
    "count, sizes",
    [
        (520, {"max_connections": 512, "max_connections_per_address": 128}),
        pytest.param(4100, {}, marks=pytest.mark.exhaustive),
    ],
    ids=["few", "defaults"],
)
def test_half_requests_and_a_client_with_the_key_is_answered(
    tmp_path, parser, many_files, count, sizes
):
    count = min(count, (many_files - 500) // 2)
    half = POST + b"Content-Len"
    for settings in (sizes, {**sizes, "max_connections_per_address": 0}):
        with contextlib.ExitStack() as stack:
            address, _, _ = stack.enter_context(
                fake(tmp_path / str(settings is sizes), api_keys=(KEY,), **settings)
            )
            held = [stack.enter_context(opened(address, half)) for _ in range(count)]
            for _ in range(3):
                began = time.monotonic()
                assert ask(address, "/v1/videos", headers=BEARER)[0] == 200
                assert time.monotonic() - began < 5.0  # a locked-out client waits for its timeout
            done = client(address, KEY).videos.create_and_poll(prompt="x")
            assert done.status == "completed"
            left = sum(map(is_open, held))
            free = settings.get("max_connections", 4096) * 3 // 4  # the rest is for keys
            bound = settings.get("max_connections_per_address", 1024) or free
            assert bound - 8 <= left <= bound


def test_an_open_connection_with_a_key_outlives_a_flood(tmp_path, parser):
    settings = {"api_keys": (KEY,), "max_connections": 64, "max_connections_per_address": 0}
    request = HEAD.replace(b"/health", b"/v1/models") + f"Authorization: Bearer {KEY}\r\n".encode()
    with fake(tmp_path, **settings) as (address, _, _), contextlib.ExitStack() as stack:
        ours = opened(address, request + b"\r\n")
        assert one_answer(ours).startswith(b"HTTP/1.1 200")
        # complete requests without the key count as nobody's
        words = [HEAD, HEAD + b"\r\n", request.replace(KEY.encode(), b"another-key-1") + b"\r\n"]
        for i in range(300):
            stack.enter_context(opened(address, words[i % 3]))
        ours.sendall(request + b"\r\n")
        assert one_answer(ours).startswith(b"HTTP/1.1 200")
        ours.close()


def test_a_client_that_does_not_read_its_answer_makes_room(tmp_path):
    """Of a page, asked for again and again on one connection."""
    page = HEAD.replace(b"/health", b"/page.js") + b"\r\n"
    settings = {"api_keys": (KEY,), "max_connections": 16}
    with fake(tmp_path, **settings) as (address, _, _), contextlib.ExitStack() as stack:
        for _ in range(40):
            one = stack.enter_context(opened(address))
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                for _ in range(200):
                    one.send(page)
        assert ask(address, "/v1/models", headers=BEARER)[0] == 200


# --- how the connections are counted ---


class Fake:
    """A connection of an address."""

    def __init__(self, table, address, idle=False):
        self.address, self.idle, self.closed = client_address(address), idle, None
        self.table = table
        table.add(self)

    def close_for_room(self, newest):
        self.closed = "refused" if newest else "closed"

    def knows(self, key=KEY):
        return self.table.admit(self, f"Bearer {key}")


def table(**settings):
    return Connections(Settings(Path("x"), api_keys=(KEY,), **settings))


def test_an_address_has_a_bound_and_proxies_have_none():
    made = table(max_connections_per_address=3, trusted_proxies=("10.1.0.0/16", "2001:db8:5::1"))
    one = [Fake(made, "192.0.2.1") for _ in range(5)]
    other = [Fake(made, "192.0.2.2") for _ in range(3)]
    proxied = [Fake(made, a) for a in ("10.1.2.3", "::ffff:10.1.2.3") for _ in range(9)]
    assert [c.closed for c in one] == ["closed", "closed", None, None, None]
    assert not any(c.closed for c in other + proxied)
    # one client's network of IPv6, and IPv4 in IPv6
    same = [Fake(made, f"2001:db8::{i}") for i in range(4)] + [Fake(made, "2001:db8:0:1::1")]
    assert [c.closed for c in same] == ["closed", None, None, None, None]
    assert Fake(made, "::ffff:192.0.2.2").closed is None and other[0].closed == "closed"
    assert not any([Fake(made, "2001:db8:5::1").closed for _ in range(9)])
    off = table(max_connections_per_address=0)
    assert not any([Fake(off, "192.0.2.1").closed for _ in range(3000)])


def test_those_with_a_key_stay_and_the_newest_is_refused_where_all_are_busy():
    made = table(max_connections=16, max_connections_per_address=4)
    busy = [Fake(made, "192.0.2.1") for _ in range(4)]
    assert all(c.knows() for c in busy)
    assert Fake(made, "192.0.2.1").closed == "refused"
    busy[2].idle = True
    assert Fake(made, "192.0.2.1").closed is None and busy[2].closed == "closed"


def test_a_quarter_is_kept_for_those_with_a_key():
    made = table(max_connections=16)
    several = [Fake(made, f"192.0.2.{i}") for i in range(20)]
    assert [c.closed for c in several] == ["closed"] * 8 + [None] * 12
    assert all(c.knows() for c in several[8:11])
    more = [Fake(made, f"192.0.2.{i}") for i in range(20, 24)]
    assert not several[8].closed and several[11].closed == "closed" and not more[-1].closed


def test_more_with_a_key_than_there_is_room_for():
    made = table(max_connections=16)
    served = 0
    for i in range(16):
        one = Fake(made, f"192.0.2.{i}")
        served += one.closed is None and one.knows()
    assert served == 15
    waits = Fake(made, "192.0.2.99")
    assert waits.closed is None
    assert not waits.knows() and waits in made.waiting


def test_closed_connections_leave_nothing():
    made = table()
    several = [Fake(made, f"192.0.2.{i % 7}") for i in range(100)]
    for i, c in enumerate(several):
        c.knows(KEY if i % 2 else "wrong-key-12")
        made.remove(c)
        made.remove(c)
    assert not made.waiting and not made.known and not made.groups


@pytest.mark.parametrize("proxy", ["", "proxy", "10.0.0.0/99", "10.0.0.1:80", "\ud800"])
def test_a_proxy_that_is_no_address(proxy):
    with refuses("invalid_value", "trusted_proxies", InputError):
        table(trusted_proxies=(proxy,))


# --- few file descriptors ---

LIMITED = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
    import asyncio, uvicorn.config
    if {plain}:
        uvicorn.config.Config.get_loop_factory = lambda self: asyncio.SelectorEventLoop
    from tests.serving import FakeRunner
    from nexus_rt.serve.server import NexusServer, run_server
    held = [open("/dev/null") for _ in range({held})]
    run_server(NexusServer(FakeRunner(), sys.argv[1], port=int(sys.argv[2]), api_keys=("{key}",)))
"""


@contextlib.contextmanager
def limited(tmp_path, files, plain, held=0):
    """A server in a process with few file descriptors: address, process, log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(LIMITED).format(files=files, plain=plain, held=held, key=KEY)
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store"), str(port)],
            stderr=out, cwd=Path(__file__).parents[1],
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def there():
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return ask(address, "/ready")[0] == 200

    try:
        wait_for(there, 60)
        yield address, process, log
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.process
def test_few_descriptors_are_never_used_up(tmp_path, plain):
    with limited(tmp_path, 256, plain) as (address, _, log), contextlib.ExitStack() as stack:
        for _ in range(600):
            with contextlib.suppress(OSError):
                stack.enter_context(opened(address, HEAD))
        for _ in range(3):
            began = time.monotonic()
            assert ask(address, "/v1/videos", headers=BEARER)[0] == 200
            assert time.monotonic() - began < 5.0  # a locked-out client waits for its timeout
        assert "accept" not in log.read_text() and "Too many open files" not in log.read_text()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.process
def test_a_server_without_descriptors_does_not_spin(tmp_path, plain):
    """Where something else has used them up."""

    def seconds(process):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with (
        limited(tmp_path, 256, plain, held=190) as (address, process, log),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(100):
            with contextlib.suppress(OSError):
                stack.enter_context(opened(address, HEAD))
        before = seconds(process)
        time.sleep(3)
        assert seconds(process) - before < 1.0
        assert len(log.read_text()) < 200_000
        stack.close()

        def answered():
            with contextlib.suppress(OSError):
                return ask(address, "/v1/videos", headers=BEARER)[0] == 200

        wait_for(answered)
