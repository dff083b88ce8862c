"""What the server's tests share: a runner without models, servers in a thread and in a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import cache, partial
from pathlib import Path

import openai
import uvicorn
from openai.types import Video

from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.loading.pair_folder import MINI, find_pair
from nexus_rt.method.latents import LatentGrid
from nexus_rt.pipeline.defaults import pair_defaults
from nexus_rt.serve.connections import bounded_protocol
from nexus_rt.serve.generate import Clip, Task
from nexus_rt.serve.problems import JobFailed, WorkerLost
from nexus_rt.serve.profile import Profile
from nexus_rt.serve.requests import ClipRequest
from nexus_rt.serve.server import NexusServer

PROMPT = "a striped red circle moves left on a black background"


FIELDS = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at",
    "prompt", "remixed_from_video_id", "seconds", "size", "error",
}  # fmt: skip


def client(address, key="nobody-asks", impatient=True):
    """The official client; impatient: it polls every 20 ms, whatever the server says."""
    made = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=30)
    if impatient:
        videos = made.videos
        videos.create_and_poll = partial(videos.create_and_poll, poll_interval_ms=20)
        videos.poll = partial(videos.poll, poll_interval_ms=20)
    return made


def check_video(row):
    """A job's fields, all there, of the types that the client's model has."""
    assert set(row) == FIELDS
    # the client's sizes are a list of its own models'; it does not check them
    Video.model_validate({**row, "size": "720x1280"}, strict=True)
    assert re.fullmatch(r"\d+x\d+", row["size"])
    assert row["object"] == "video" and type(row["seconds"]) is str
    assert row["status"] in ("queued", "in_progress", "completed", "failed")
    assert (row["error"] is None) == (row["status"] != "failed")
    assert type(row["progress"]) is int and 0 <= row["progress"] <= 100
    assert (row["expires_at"] is None) == (row["status"] != "completed")
    if row["status"] == "completed":
        assert row["progress"] == 100 and row["expires_at"] > row["completed_at"]
    return row


@cache
def mini_defaults():
    return pair_defaults(find_pair(MINI, {}, {}).stated)


def mini_profile(**changes) -> Profile:
    """The mini pair's, without loading it."""
    values = {
        "defaults": mini_defaults(),
        "grid": LatentGrid(8, 4, (1, 2, 2)),
        "generators": ("small", "large"),
        "boundaries": {},
        "built_sizes": (),
        "understands": True,
        "loras": True,
        "device": "cpu",
    }
    return Profile(**{**values, **changes})


def clip_request(**values) -> ClipRequest:
    """A request of the mini pair's size; fields and settings of the call side by side."""
    fixed = {"prompt": PROMPT, "model": "m", "fps": "16", "seconds": "1", "seed": 5, "loras": ()}
    size = {"width": 64, "height": 64, "num_frames": 17}
    return ClipRequest.stored({**fixed, **size, **values})


def planned(**values):
    """What `clip_request(**values)` generates."""
    return mini_profile().check(clip_request(**values))


def task(job_id="a", lora_files=None, **values) -> Task:
    """`clip_request(**values)` as a worker gets it."""
    request = clip_request(**values)
    return Task(job_id, request, mini_profile().check(request), lora_files or {})


class FakeRunner:
    """Jobs that take `steps` steps of `seconds` each and make `size` bytes.

    A prompt says what else happens: "fail CODE" fails, "lose N" takes the worker down N times,
    "crash" raises, "unload" finds the models gone, once.
    """

    def __init__(self, steps=10, seconds=0.0, capacity=1, size=1000, profile=None):
        self.steps, self.seconds, self.capacity, self.size = steps, seconds, capacity, size
        self.profile = profile or mini_profile()
        self.begun, self.cancelled, self.losses, self.calls = [], set(), {}, []
        self.gate = None  # an asyncio.Event that steps wait for, where a test sets one
        self.unloaded = False
        self.loading = None  # an exception of `start`

    async def start(self):
        if self.loading is not None:
            raise self.loading
        return self.profile, None

    async def run(self, tasks, emit):
        self.begun += [t.request.prompt for t in tasks]
        self.calls.append(tuple(t.request.prompt for t in tasks))
        ids = {t.id for t in tasks}
        first = tasks[0].request.prompt.split()
        if first[0] == "unload" and not self.unloaded:
            self.unloaded = True
            raise ModelError("the models cannot be loaded, as asked")
        if first[0] == "fail":
            raise JobFailed(first[1], "it failed, as asked")
        if first[0] == "crash":
            raise RuntimeError("a secret of the server's")
        if first[0] == "lose":
            lost = self.losses[tasks[0].id] = self.losses.get(tasks[0].id, 0) + 1
            if lost <= int(first[1]):
                raise WorkerLost("it went down, as asked")
        for i in range(self.steps):
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.seconds)
            for task in tasks:
                emit({"id": task.id, "kind": "step", "step": i + 1, "duration_ms": 1.0})
            if ids <= self.cancelled:
                raise JobFailed("cancelled", "stopped, as asked")
        return [self.clip(t, len(tasks)) for t in tasks if t.id not in self.cancelled]

    def clip(self, task, batch):
        perf = {
            "total_duration_ms": 10.0,
            "steps": [{"name": n, "duration_ms": 1.0} for n in ("encode", "denoise", "decode")],
            "denoise_steps_ms": [{"step": i, "duration_ms": 1.0} for i in range(self.steps)],
            "memory_checkpoints": {"decode": {"rss_mb": 1.0}},
            "meta": {"seed": task.request.seed, "plan": "small", "batch": batch,
                     "residency_moves": 0},
        }  # fmt: skip
        perf["steps"].append({"name": "write", "duration_ms": 1.0})
        return Clip(task.id, bytes(self.size), b"webp", b"jpeg", perf)

    def cancel(self, job_id):
        self.cancelled.add(job_id)

    async def close(self):
        pass


class PromptServer(uvicorn.Server):
    """uvicorn's server, which looks ten times as often at whether it is to stop."""

    async def main_loop(self):
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def serving(server: NexusServer, app=None):
    """A server in a thread of this process; yields its address."""
    config = uvicorn.Config(
        app or server.alone, host="127.0.0.1", port=0, log_config=None, ws="none",
        timeout_graceful_shutdown=5, http=bounded_protocol(server.settings),
    )  # fmt: skip
    http = PromptServer(config)
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    wait_for(lambda: http.started or not thread.is_alive())
    assert http.started, "the server did not start"
    port = http.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(InputError):  # of a server that did not start
            server.dispatcher.hub.closed = True  # open streams would be waited for
        http.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def fake(tmp_path, runner=None, ready=True, **settings):
    """A server on a `FakeRunner`: the address, the server, the runner."""
    runner = runner or FakeRunner()
    server = NexusServer(runner, tmp_path / "store", **settings)
    with serving(server) as address:
        if ready:
            wait_for(lambda: server.dispatcher.ready)
        yield address, server, runner


def workers():
    """Worker processes of this process that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_bytes()
            if int(parent) == os.getpid() and state != "Z" and b"spawn_main" in command:
                found.append(int(stat.parent.name))
    return found


def wait_for(what, seconds=20.0):
    """What a function returns, once that is true."""
    until = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)
    return value


def ask(address, path, method="GET", body=None, headers=None):
    """Status, headers and body of one request; JSON is read."""
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    kind = {"Content-Type": "application/json"} if isinstance(body, (dict, list)) else {}
    request = urllib.request.Request(
        address + path, data=data, method=method, headers={**kind, **(headers or {})}
    )
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read()
    if answer.headers.get_content_type() == "application/json":
        return answer.status, answer.headers, json.loads(text)
    return answer.status, answer.headers, text


def messages(address, path, headers=None):
    """A job's server-sent events, (kind, data) as they come."""
    request = urllib.request.Request(address + path, headers=headers or {})
    with urllib.request.urlopen(request, timeout=30) as stream:
        assert stream.headers.get_content_type() == "text/event-stream"
        kind = None
        for line in stream:
            word, _, rest = line.decode().rstrip("\n").partition(": ")
            if word == "event":
                kind = rest
            elif word == "data":
                yield kind, json.loads(rest)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ServerProcess:
    """`nexus-rt serve` in a process of its own."""

    def __init__(self, store: Path, *arguments: str, port: int | None = None, env=None):
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = store.with_suffix(".log")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nexus_rt.cli", "serve", "--store", str(store), "--port",
             str(self.port), *arguments],
            stderr=open(self.log, "ab"),  # noqa: SIM115
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )  # fmt: skip

    def ready(self, seconds=60.0):
        def answers():
            assert self.process.poll() is None, self.log.read_text()
            try:
                return ask(self.address, "/ready")[0] == 200
            except OSError:
                return False

        wait_for(answers, seconds)
        return self

    def rows(self):
        """The log's lines of JSON."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def end(self, number, seconds=30.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
