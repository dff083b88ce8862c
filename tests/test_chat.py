"""The chat client against a server in this process: what neither a judge's nor a rewriter's tests
see of it."""

import json
import threading
import time

import pytest

from nexus_rt.core.chat import MAX_REPLY, ChatClient, ChatError, ChatUnavailable, Reply, of_choice
from nexus_rt.core.deadline import begin, result_within
from tests.refusals import refuses
from tests.vrbench import servers

BODY = {"model": "m", "messages": []}
PROXIES = ("all_proxy", "http_proxy", "https_proxy", "no_proxy")


@pytest.fixture
def serve(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with servers() as start:
        yield start


def test_a_redirect_takes_the_key_nowhere(serve):
    other = serve(lambda n, body: "stolen")
    server = serve(lambda n, body: (307, {"Location": other.url}, "moved"))
    with refuses("unreachable", kind=ChatError) as caught:
        ChatClient(server.url, "secret", 5).reply(BODY)
    assert "status 307" in str(caught.value) and not other.seen


def test_a_reply_is_bounded(serve):
    whole = serve(lambda n, body: (200, {}, b" " * (MAX_REPLY + 1)))
    with refuses("too_large", kind=ChatError):
        ChatClient(whole.url, None, 30).reply(BODY)
    assert len(whole.seen) == 1


def test_a_stop_frees_who_waits_for_a_reply_and_who_waits_to_try_again(serve):
    release = threading.Event()
    slow = serve(lambda n, body: release.wait(30) and "late")
    busy = serve(lambda n, body: (503, {"Retry-After": "60"}, "later"))
    for server in (slow, busy):
        client = ChatClient(server.url, None, 60, tries=2)
        future = begin(lambda client=client: client.reply(BODY))
        while not server.seen:
            time.sleep(0.01)
        client.stop()
        with refuses("cancelled", kind=ChatError):
            result_within(future, 5)
        with refuses("cancelled", kind=ChatError):  # and nothing is asked any more
            client.reply(BODY)
        assert len(server.seen) == 1
    release.set()


def test_a_user_in_the_address_is_basic_authentication(serve):
    server = serve(lambda n, body: "fine")
    url = server.url.replace("http://", "http://user:w%40rd@")
    client = ChatClient(url, "key", 5)
    assert client.reply(BODY) == Reply("fine")
    assert server.headers[0]["Authorization"] == "Basic dXNlcjp3QHJk"
    assert "user" not in client.address + client.host


def test_an_address_is_written_as_a_request_needs_it(serve):
    server = serve(lambda n, body: "fine")
    assert ChatClient(f"{server.url}/dépôt 1?a=b c", None, 5).reply(BODY).text == "fine"
    assert server.paths == ["/v1/d%C3%A9p%C3%B4t%201/chat/completions?a=b%20c"]
    with refuses("unreachable", kind=ChatUnavailable) as caught:  # a name that nobody has
        ChatClient("http://bücher.invalid", None, 5).reply(BODY)
    assert "bücher.invalid/chat/completions cannot be reached" in str(caught.value)


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_the_environments_proxy_is_asked_but_for_hosts_without(serve, name, monkeypatch):
    proxy, server = (serve(lambda n, body, who=who: who) for who in ("proxy", "server"))
    monkeypatch.setenv(name, proxy.url.removeprefix("http://").removesuffix("/v1"))
    ask = lambda: ChatClient(server.url, None, 5).reply(BODY).text
    assert ask() == "proxy"
    assert proxy.paths == [f"{server.url}/chat/completions"]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert ask() == "server"


def test_a_failure_that_another_try_mends(serve):
    server, waits = serve(lambda n, body: (429, {"Retry-After": "7"}, "") if n == 1 else "ok"), []
    assert ChatClient(server.url, None, 5, tries=2, wait=waits.append).reply(BODY).text == "ok"
    assert waits == [7]
    lost = serve(lambda n, body: (500, {}, "out of memory"))
    with refuses("unreachable", kind=ChatError) as caught:
        ChatClient(lost.url, None, 5).reply(BODY)
    assert str(caught.value) == "status 500"  # one try is not counted


@pytest.mark.parametrize(
    "message, reply",
    [
        ({"content": ["a", {"type": "text", "text": "b"}, {"type": "image"}, 3]}, Reply("ab")),
        ({"content": None, "refusal": "I cannot"}, Reply("I cannot", refusal=True)),
        ({"content": "x", "refusal": ""}, Reply("x")),
        ({"content": "x", "refusal": None, "reasoning": "hm"}, Reply("x", reasoning=True)),
        ({"content": 3}, Reply("")),
    ],
)
def test_a_choice_is_read_in_all_its_forms(message, reply):
    assert of_choice(json.loads(json.dumps({"message": message}))) == reply


def test_a_call_within_its_time():
    assert result_within(begin(lambda: 3), 5) == 3
    with pytest.raises(ZeroDivisionError):
        result_within(begin(lambda: 1 / 0), 5)
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        result_within(begin(release.wait), 0.05)
    release.set()
    own = begin(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    with pytest.raises(TimeoutError, match="its own"):
        result_within(own, 5)
