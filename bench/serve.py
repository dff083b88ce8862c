"""Load on a server of this machine: what stays of it, and how fast it answers meanwhile.

    python -m nexus_rt.bench.serve --json serve.json

Starts `nexus-rt serve` on the mini pair, sends to loopback alone, and stops by itself: every loop
is bounded in number, and the whole in seconds. In turn:

- quiet: GETs of one job, nothing else going on;
- churn: jobs that are queued and cancelled, with the server's memory before, half-way and after;
- connections: event streams that are read slowly, connections that say nothing, and half-sent
  requests, all open at once, while jobs run and GETs are timed;
- malformed: broken multipart and JSON bodies;
- lost: every job that was accepted has ended, once, and the server is as ready as before.

Then, without a server: what batches and previews cost (`--runs 0` leaves it out).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nexus_rt.bench.measure import percentile
from nexus_rt.core.process import resident_bytes

HOST = "127.0.0.1"  # and nowhere else
PROMPT = b'{"prompt": "a red circle moves left on a black background"}'


class Connection:
    """A kept HTTP/1.1 connection to the server under test, opened anew after a pause."""

    def __init__(self, port: int) -> None:
        self.port, self.used = port, 0.0
        self.reader: asyncio.StreamReader | None = None

    async def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and body of one request."""
        if time.monotonic() - self.used > 10:  # the server closes what is idle
            self.close()
        self.used = time.monotonic()
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection(HOST, self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n"
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        content = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), content

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()
            self.reader = None


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    count = resident_bytes(pid)
    assert count is not None, "resident memory is read from /proc: run this on Linux"
    return count / 2**20


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 95th and 99th percentile, maximum."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * percentile(seconds, share), 2) for name, share in shares.items()}


async def time_gets(port: int, path: str, count: int, pause: float = 0.0) -> dict[str, float]:
    """Latency of GETs one after the other on one connection."""
    connection, seconds = Connection(port), []
    for _ in range(count):
        began = time.perf_counter()
        status, _ = await connection.ask("GET", path)
        seconds.append(time.perf_counter() - began)
        assert status == 200, status
        await asyncio.sleep(pause)
    connection.close()
    return summary(seconds)


async def churn(port: int, count: int, lanes: int) -> dict[str, int]:
    """Queue jobs and cancel each at once, on several connections; what became of them."""
    left, tally = iter(range(count)), {"cancelled": 0, "completed": 0, "refused": 0}

    async def lane() -> None:
        connection = Connection(port)
        for _ in left:
            status, body = await connection.ask("POST", "/v1/videos", PROMPT)
            if status == 429:
                tally["refused"] += 1
                continue
            assert status == 200, body
            path = f"/v1/videos/{json.loads(body)['id']}"
            status, body = await connection.ask("POST", f"{path}/cancel")
            assert status == 200, body
            job = json.loads(body)
            tally["cancelled" if job["status"] == "failed" else "completed"] += 1
        connection.close()

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return tally


async def hold(port: int, kind: str, path: str, until: asyncio.Event) -> str:
    """One held connection: a stream read slowly, a silent one, or half a request."""
    reader, writer = await asyncio.open_connection(HOST, port)
    head = f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode()
    try:
        if kind == "stream":
            writer.write(head)
            await reader.readuntil(b"\r\n")
        elif kind == "half":
            writer.write(head[:30])
        while not until.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(until.wait(), 1.0)
            if kind == "stream":  # a few bytes a second
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(reader.read(16), 0.05)
        return kind
    finally:
        writer.close()


FORM = "multipart/form-data; boundary=b"
BROKEN = (
    (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n', FORM),
    (b"nothing of the kind", FORM),
    (b"", "multipart/form-data"),
    (b"{" * 3000, "application/json"),
    (b'{"prompt": "x", "seed": "' + b"9" * 3000 + b'"}', "application/json"),
    (b"\xff" * 3000, "application/x-www-form-urlencoded"),
)


async def malformed(port: int, count: int) -> dict[str, int]:
    """Broken bodies; how they were answered."""
    connection, rng = Connection(port), random.Random(0)
    answers: dict[str, int] = {}
    for i in range(count):
        body, kind = BROKEN[i % len(BROKEN)]
        cut = body[: rng.randint(0, len(body))]
        status, _ = await connection.ask("POST", "/v1/videos", cut, kind)
        answers[str(status)] = answers.get(str(status), 0) + 1
    connection.close()
    return answers


async def run(port: int, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """All parts, against a server that is ready."""
    first = Connection(port)
    job = json.loads((await first.ask("POST", "/v1/videos", PROMPT))[1])
    path = f"/v1/videos/{job['id']}"
    while json.loads((await first.ask("GET", path))[1])["status"] != "completed":
        await asyncio.sleep(0.05)
    results: dict[str, Any] = {"quiet_get_ms": await time_gets(port, path, args.gets)}
    await churn(port, min(200, args.jobs), 8)  # what is allocated once is allocated now
    memory, began, half = [resident_mb(pid)], time.perf_counter(), args.jobs // 2
    watching = asyncio.create_task(time_gets(port, path, args.gets, 0.01))
    tallies = []
    for count in (half, args.jobs - half):
        tallies.append(await churn(port, count, 8))
        memory.append(resident_mb(pid))
    seconds = time.perf_counter() - began
    results["churn"] = {
        "jobs": args.jobs,
        **{k: sum(t[k] for t in tallies) for k in tallies[0]},
        "jobs_per_second": round(args.jobs / seconds, 1),
        "get_ms": await watching,
        "rss_mb": [round(m, 1) for m in memory],
        "slope_kb_per_job": round(1024 * (memory[2] - memory[1]) / max(1, args.jobs - half), 3),
    }
    jobs = []
    for _ in range(args.running):
        made = await first.ask("POST", "/v1/videos", PROMPT)
        jobs.append(json.loads(made[1])["id"])
    until, before = asyncio.Event(), resident_mb(pid)
    kinds = ["stream", "stream", "silent", "half"]
    held = [
        asyncio.create_task(
            hold(port, kinds[i % 4], f"/v1/videos/{jobs[i % len(jobs)]}/events", until)
        )
        for i in range(args.connections)
    ]
    await asyncio.sleep(1.0)
    opened = sum(not task.done() for task in held)
    results["connections"] = {
        "open": opened,
        "get_ms": await time_gets(port, path, args.gets),
        "rss_mb": [round(before, 1), round(resident_mb(pid), 1)],
    }
    until.set()
    kept = await asyncio.gather(*held, return_exceptions=True)
    results["connections"]["dropped"] = sum(isinstance(k, BaseException) for k in kept)
    results["malformed"] = await malformed(port, args.malformed)
    results["lost"] = await count_lost(first, jobs)
    first.close()
    return results


async def count_lost(connection: Connection, jobs: list[str]) -> dict[str, Any]:
    """Wait for the accepted jobs; how they and all others ended."""
    left = set(jobs)
    while left:
        for job in list(left):
            row = json.loads((await connection.ask("GET", f"/v1/videos/{job}"))[1])
            if row["status"] in ("completed", "failed"):
                assert row["status"] == "completed", row
                left.remove(job)
        await asyncio.sleep(0.1)
    text = (await connection.ask("GET", "/metrics"))[1].decode()
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    submitted = float(numbers["nexus_rt_jobs_submitted_total"])
    ended = sum(float(v) for k, v in numbers.items() if k.startswith("nexus_rt_jobs_ended_total"))
    ready = (await connection.ask("GET", "/ready"))[0] == 200
    return {"submitted": submitted, "ended": ended, "lost": submitted - ended, "ready": ready}


def measure_parts(runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds a clip of the mini pair in batches, and of a preview at two sizes."""
    import torch

    from nexus_rt.core.timing import medians_ms
    from nexus_rt.pipeline.pipeline import NexusPipeline
    from nexus_rt.serve.generate import ServedPipeline, Task, warmup_request
    from nexus_rt.serve.preview import picture

    pipe = NexusPipeline.from_pretrained()
    served = ServedPipeline(pipe, preview_every=0)
    request = warmup_request(pipe.defaults)
    planned = served.profile.check(request)

    def batch(size: int) -> Callable[[], object]:
        tasks = [Task(str(i), replace(request, seed=i), planned) for i in range(size)]
        return lambda: served.run(tasks, lambda event: None)

    def preview(height: int, width: int) -> Callable[[], object]:
        latents = torch.randn(1, 16, 5, height // 8, width // 8)
        rgb = served.rgb
        assert rgb is not None  # the mini pair's is shipped
        return lambda: picture(rgb.frames(latents)[0].numpy())

    clips = medians_ms({str(n): batch(n) for n in (1, 2, 4)}, runs, min(runs - 1, 2))
    shown = {"64x64": preview(64, 64), "832x480": preview(480, 832)}
    return {
        "batch_ms_a_clip": {n: round(ms / int(n), 1) for n, ms in clips.items()},
        "preview_ms": {n: round(ms, 3) for n, ms in medians_ms(shown, 20 * runs).items()},
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m nexus_rt.bench.serve", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--jobs", type=int, default=10_000, help="jobs queued and cancelled")
    made.add_argument("--connections", type=int, default=1000, help="connections held open")
    made.add_argument("--running", type=int, default=20, help="jobs that run beside those")
    made.add_argument("--gets", type=int, default=2000, help="timed GETs a part")
    made.add_argument("--malformed", type=int, default=2000, help="broken bodies")
    made.add_argument("--runs", type=int, default=5, help="of batches and previews")
    made.add_argument("--seconds", type=float, default=420.0, help="limit of the whole")
    made.add_argument("--json", metavar="FILE", help="where the figures go")
    return made


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a job was lost."""
    import resource

    import torch

    from nexus_rt.bench.results import fingerprint, write_text

    args = parser().parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nexus_rt.cli", "serve", "--store", f"{folder}/jobs"]
        server = subprocess.Popen(
            [*command, "--port", str(port), "--log-level", "error"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "NEXUS_RT_API_KEY": ""},
        )
        try:
            results = asyncio.run(_measure(port, server, args))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    line = " ".join(["python -m nexus_rt.bench.serve", *(sys.argv[1:] if argv is None else argv)])
    if args.runs:
        results["parts"] = measure_parts(args.runs)
    results = {"fingerprint": fingerprint(torch.device("cpu"), {}, line), **results}
    text = json.dumps(results, indent=1)
    print(text)
    if args.json:
        write_text(Path(args.json), text + "\n")
    return 1 if results["lost"]["lost"] or not results["lost"]["ready"] else 0


async def _measure(port: int, server: subprocess.Popen, args: argparse.Namespace) -> dict[str, Any]:
    async def whole() -> dict[str, Any]:
        while True:
            assert server.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                probe = Connection(port)
                if (await probe.ask("GET", "/ready"))[0] == 200:
                    probe.close()
                    break
            await asyncio.sleep(0.1)
        return await run(port, server.pid, args)

    return await asyncio.wait_for(whole(), args.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
