"""Whatever stands in a request's line and headers, the answer is never a 500."""

import json
import random

import pytest

from nexus_rt.serve import bodies, connections
from tests.more import more
from tests.serving import FakeRunner, client, fake
from tests.test_serve_connections import KEY, PARSERS, one_answer, opened, parser  # noqa: F401

ODD = [
    b"http://[", b"[", b"]", b"[::1", b"http://[::1]:99999999999", b"http://a:b", b"//", b":", b"://",
    b"http://\xff\xfe", b"\xed\xa0\x80", b"\xc3\xa9", b"%00", b"%ed%a0%80", b"%", b"%zz", b"null", b"",
    b",", b";", b"=", b'"', b"\\", b"a" * 5000, b"9" * 5000, b"-1", b"1e999", b"nan", b"\xd9\xa1",
    b"bytes=0-", b"bytes=-", b"bytes=9-1", b"bytes=" + b"9" * 5000 + b"-", b"bytes=" + b"0-1," * 5000,
    b"bytes=\xd9\xa1-2", b"bytes", b"bytes=-0", b"bytes=--1", b"other=1-2", b"Bearer", b"Bearer ",
    b"Bearer \xff\xfe", b"Basic Og==", b"bearer  " + KEY.encode(), b"Bearer " + KEY.encode() + b"\xa0",
    b"multipart/form-data", b"multipart/form-data; boundary=", b'multipart/form-data; boundary="',
    b"multipart/form-data; boundary=\xff; charset=nothing", b"multipart/form-data; boundary=" + b"x" * 999,
    b"application/x-www-form-urlencoded; charset=utf-7", b"application/json; charset=nothing",
    b"application/json;;;=", b"text/\xff", b"*/*;q=nan", b"a=b; c; =d; \xff", b"\xe2\x80\xa8", b"\t",
    b"Thu, 01 Jan 0000 00:00:00 GMT", b"100-continue", b"gzip", b"chunked", b"websocket", b"close",
    b"__proto__", b"http://x\x00y", b"\x01", b"\x7f", b"xn--\xff", b"http://\xef\xbc\x85",
    b"http://a\xe2\x84\x80b",
]  # fmt: skip
HEADERS = [
    b"Host", b"Origin", b"Range", b"If-Range", b"Authorization", b"Content-Type", b"Content-Length",
    b"Accept", b"Accept-Encoding", b"Cookie", b"Referer", b"User-Agent", b"X-Forwarded-For",
    b"X-Forwarded-Proto", b"X-Forwarded-Host", b"Forwarded", b"Expect", b"Transfer-Encoding", b"Upgrade",
    b"Connection", b"If-None-Match", b"If-Modified-Since", b"Content-Disposition", b"x-request-id",
]  # fmt: skip
PATHS = [
    b"/", b"/page.js", b"/health", b"/ready", b"/metrics", b"/absent", b"/v1/models", b"/v1/models/x",
    b"/v1/videos", b"/v1/videos/", b"/v1/plan", b"/v1/videos/JOB", b"/v1/videos/JOB/content",
    b"/v1/videos/JOB/content?variant=thumbnail", b"/v1/perf/JOB", b"/v1/videos/characters/x",
]  # fmt: skip
PARTS = [
    b"%00", b"%ed%a0%80", b"%ff%fe", b"%2e%2e%2f", b"..%2f..%2fetc", b"%", b"%zz", b"a" * 3000, b"%0a",
    b"%E2%80%AE", b"%F0%9F%98%80", b"'", b"&", b"%25", b"%5b", b"[", b"+", b"1e400", b"9" * 400, b"-1",
    b"nan", b"%D9%A1", b"0x10", b"1_0", b"shift%3D1e-40", b"%c0%80", b"*", b"..", b"%7f", b"%3a%2f%2f",
]  # fmt: skip
QUERIES = [
    b"after", b"limit", b"order", b"variant", b"size", b"plan", b"seconds", b"fps", b"num_frames",
    b"seed", b"lora", b"lora[]", b"shift", b"guidance_scale", b"num_inference_steps", b"solver",
    b"model", b"rewrite", b"negative_prompt", b"priority", b"deadline", b"prompt",
]  # fmt: skip


@pytest.fixture
def sites(tmp_path, monkeypatch):
    """Servers with and without keys: what sends a request and returns the status."""
    monkeypatch.setattr(bodies, "SECONDS", 0.1)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with (
        fake(tmp_path / "keys", FakeRunner(size=4000), api_keys=(KEY,)) as (keyed, _, _),
        fake(tmp_path / "none", FakeRunner(size=4000)) as (plain, _, _),
    ):
        jobs = {a: client(a, KEY).videos.create_and_poll(prompt="x").id for a in (keyed, plain)}

        def send(address, method, target, *lines, body=b""):
            own = {line.partition(b":")[0].lower() for line in lines}
            begin = [method + b" " + target.replace(b"JOB", jobs[address].encode()) + b" HTTP/1.1"]
            for name, value in (
                (b"Host", b"localhost"),
                (b"Authorization", b"Bearer " + KEY.encode()),
                (b"Connection", b"close"),
            ):
                if name.lower() not in own:
                    begin.append(name + b": " + value)
            words = b"\r\n".join([*begin, *lines]) + b"\r\n\r\n" + body
            with opened(address, words) as one:
                got = one_answer(one)
            if not got:  # a body that is declared and does not come
                assert b"Content-Length" in words or b"Transfer-Encoding" in words, words
                return 408
            assert got.startswith(b"HTTP/1.1 "), (words, got[:200])
            status = int(got.split()[1])
            if status == 100:
                status = int(got.partition(b"\r\n\r\n")[2].split()[1])
            assert status < 500, (words, got[:500])
            head, _, text = got.partition(b"\r\n\r\n")
            if b"application/json" in head and b"chunked" not in head:
                json.loads(text)
            return status

        yield send, (keyed, plain)


def test_an_origin_that_cannot_be_parsed_is_another_site(sites):
    send, (keyed, plain) = sites
    for value in (b"http://[", b"http://[::1", b"http://localhost\xff", b"http://a]", b"", b"//"):
        assert send(plain, b"GET", b"/v1/models", b"Origin: " + value) == 403, value
        assert send(keyed, b"GET", b"/v1/models", b"Origin: " + value) == 200, value
    for value in (b"http://localhost", b"https://localhost", b"HTTP://LOCALHOST"):
        assert send(plain, b"GET", b"/v1/models", b"Origin: " + value) == 200, value
    for value in (b"ftp://localhost", b"http://localhost:1", b"http://localhost/", b"localhost"):
        assert send(plain, b"GET", b"/v1/models", b"Origin: " + value) == 403, value


def test_a_host_that_cannot_be_parsed(sites):
    send, (keyed, plain) = sites
    for value in (
        b"[",
        b"[::1",
        b"a]",
        b"x:y",
        b"\xff",
        b"localhost\xff",
        b"//",
        b"http://localhost",
    ):
        for path in PATHS:
            assert send(plain, b"GET", path, b"Host: " + value) in (307, 400, 403, 404), (
                value,
                path,
            )
            assert send(keyed, b"GET", path, b"Host: " + value) < 500


@pytest.mark.parametrize(
    "parser, count",
    [
        (PARSERS[1], 12),
        *(pytest.param(p, len(ODD), marks=pytest.mark.exhaustive) for p in PARSERS),
    ],
    indirect=["parser"],
)
def test_any_header_on_any_route(sites, parser, count):  # noqa: F811
    """Each header with `count` of the odd values, on routes in turn."""
    send, addresses = sites
    rng, seen = random.Random(5), set()
    for name in HEADERS:
        for value in rng.sample(ODD, count):
            target, address = rng.choice(PATHS), rng.choice(addresses)
            method, body = b"GET", b""
            if rng.random() < 0.3:
                method, target, body = b"POST", b"/v1/videos", b'{"prompt": "x"}'
            lines = [name + b": " + value]
            if body and name not in (b"Content-Length", b"Transfer-Encoding"):
                lines.append(b"Content-Length: %d" % len(body))
            seen.add(send(address, method, target, *lines, body=body))
    for name, target in ((b"Range", b"/v1/videos/JOB/content"), (b"Origin", b"/"), (b"Host", b"/")):
        for value in ODD:
            seen.add(send(addresses[0], b"GET", target, name + b": " + value))
    assert {200, 206, 400, 401, 403, 404, 415} <= seen


@pytest.mark.parametrize("parser", [PARSERS[1], *more(PARSERS[0])], indirect=True)
def test_any_path_and_query(sites, parser):  # noqa: F811
    send, (keyed, _) = sites
    seen = set()
    for part in PARTS:
        for start in (b"/", b"/v1/videos/", b"/v1/models/", b"/v1/perf/", b"/v1/videos/JOB/", b""):
            seen.add(send(keyed, b"GET", start + part))
        seen.add(send(keyed, b"GET", b"/v1/videos?" + part))
        for name in QUERIES:
            for route in (b"/v1/plan", b"/v1/videos", b"/v1/videos/JOB/content"):
                seen.add(send(keyed, b"GET", route + b"?" + name + b"=" + part))
    assert {200, 400, 404} <= seen


@pytest.mark.parametrize("name", PARSERS)
def test_a_plan_that_cannot_be_computed_is_a_400(sites, name):
    send, (keyed, _) = sites
    for value in (b"1e-40", b"1e-320", b"0", b"-1", b"1e300", b"nan", b"inf"):
        assert send(keyed, b"GET", b"/v1/plan?shift=" + value) == 400, value
        assert send(keyed, b"GET", b"/v1/plan?plan=small/shift%3D" + value) == 400, value
        body = json.dumps({"prompt": "x", "shift": value.decode()}).encode()
        size = b"Content-Length: %d" % len(body)
        kind = b"Content-Type: application/json"
        assert send(keyed, b"POST", b"/v1/videos", kind, size, body=body) == 400
