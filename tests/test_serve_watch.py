"""Workers that hang or do not read, and what the server says meanwhile."""

import asyncio
import atexit
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.serve import generate, logs
from nexus_rt.serve.prices import Prices
from nexus_rt.serve.problems import JobFailed, WorkerLost
from nexus_rt.serve.runners import ProcessRunner, ThreadRunner
from nexus_rt.serve.server import NexusServer
from nexus_rt.serve.watchdog import (
    FACTOR,
    MAX_TICK,
    MIN_SECONDS,
    UNPRICED_SECONDS,
    UNPRICED_STEPS,
    Bounds,
    Call,
)
from tests.refusals import refuses
from tests.serving import (
    PROMPT,
    FakeRunner,
    ask,
    client,
    fake,
    planned,
    serving,
    task,
    wait_for,
    workers,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- the clock of a call ---


def bounds(step=1000.0, stage=1000.0, steps=4, timeout=None, rewriting=5.0):
    stages = dict.fromkeys(("encode", "decode", "write"), stage)
    return Bounds((step,) * steps, stages, rewriting, timeout)


def run_until_hung(call, limit=10_000.0, tick=0.25):
    """Seconds of silence after which a call counts as hung."""
    seconds = 0.0
    while call.tick(tick) is None:
        seconds += tick
        assert seconds < limit
    return seconds


def at(stage, done=0, of=None):
    """A call at a stage, its kind having run before."""
    call = Call(frozenset("ab"), of or bounds())
    call.heard({"kind": "stage", "stage": "encode", "fresh": False})
    for i in range(done):
        call.heard({"kind": "step", "step": i + 1})
    if stage in ("decode", "write"):
        call.heard({"kind": "stage", "stage": stage})
    return call


@pytest.mark.parametrize(
    ("price", "expected"), [(1000.0, MIN_SECONDS), (20_000.0, 200.0), (None, UNPRICED_SECONDS)]
)
def test_a_silent_step_and_stage_are_bounded_by_their_prices(price, expected):
    of = bounds(step=price, stage=price)
    assert run_until_hung(at("denoise", 1, of)) == pytest.approx(expected, abs=0.5)
    assert run_until_hung(at("decode", 4, of)) == pytest.approx(expected, abs=0.5)
    assert run_until_hung(at("write", 4, of)) == pytest.approx(expected, abs=0.5)
    # encoding ends with the first step's event
    assert run_until_hung(at("encode", 0, of)) == pytest.approx(2 * expected, abs=0.5)


def test_a_remote_rewriter_has_its_own_time():
    call = at("encode", 0, bounds(timeout=0.5, stage=10.0))
    call.heard({"kind": "phase", "phase": "rewrite"})
    assert run_until_hung(call) == pytest.approx(0.5 + 5.0, abs=0.5)
    call = at("encode", 0, bounds(timeout=0.5, stage=10.0))
    call.heard({"kind": "phase", "phase": "rewrite"})
    call.heard({"kind": "phase", "phase": "encode"})
    call.heard({"kind": "rewriting", "text": "x"})
    assert run_until_hung(call) == pytest.approx(1.0, abs=0.5)


def test_a_step_timeout_overrides_the_price_and_scales_the_stages():
    of = bounds(timeout=3.0)
    assert run_until_hung(at("denoise", 1, of)) == pytest.approx(3.0, abs=0.5)
    assert run_until_hung(at("decode", 4, of)) == pytest.approx(FACTOR * 1.0, abs=0.5)
    unpriced = bounds(None, None, timeout=3.0)
    assert run_until_hung(at("denoise", 1, unpriced)) == pytest.approx(3.0, abs=0.5)
    assert run_until_hung(at("write", 4, unpriced)) == pytest.approx(3 * UNPRICED_STEPS, abs=0.5)


def test_a_workers_first_clip_of_a_size_may_compile():
    fresh = Call(frozenset("a"), bounds())
    fresh.heard({"kind": "stage", "stage": "encode", "fresh": True})
    fresh.heard({"kind": "step", "step": 1})
    assert run_until_hung(fresh) == pytest.approx(UNPRICED_SECONDS, abs=0.5)


def test_what_is_heard_begins_the_clock_again_but_a_cancelled_call_ends_within_one_bound():
    going = at("denoise", 1)
    for i in range(10_000):  # it is heard of in time, for hours
        assert going.tick(MAX_TICK) is None
        if i % 30 == 29:
            going.heard({"kind": "preview", "step": 1})
    assert going.cancel("a") and not going.cancel("a")  # one cancel a job
    assert going.ending is None  # the other job goes on
    assert going.cancel("b")
    seconds = 0.0
    while (why := going.tick(MAX_TICK)) is None:  # it goes on as if nothing had been
        going.heard({"kind": "step", "step": 2})
        seconds += MAX_TICK
        assert seconds < 1000
    assert seconds == pytest.approx(MIN_SECONDS, abs=1.5) and "did not stop" in why
    assert going.tick(MAX_TICK) is None and going.hung == why  # counted once


def test_waiting_for_a_worker_and_a_server_that_stood_still_are_no_silence():
    call = at("denoise", 1)
    call.heard({"kind": "waiting"})
    assert not any(call.tick(MAX_TICK) for _ in range(5000))
    call.heard({"kind": "begun"})
    assert call.tick(1e6) is None and call.silent == MAX_TICK


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["step", "preview", "stage", "cancel", "tick"]), max_size=60),
    st.one_of(st.none(), st.floats(0.1, 50)),
)
def test_whatever_happens_a_call_that_falls_silent_is_noticed(events, timeout):
    call, done = Call(frozenset("ab"), bounds(timeout=timeout)), 0
    for i, kind in enumerate(events):
        if kind == "tick":
            call.tick(0.5)
        elif kind == "cancel":
            call.cancel("ab"[i % 2])
        elif kind == "step":
            done = min(done + 1, 4)
            call.heard({"kind": "step", "step": done})
        else:
            call.heard({"kind": kind, "stage": "decode"})
    most = max(UNPRICED_SECONDS, UNPRICED_STEPS * (timeout or 0.0), FACTOR) * 2 + 10
    assert call.hung or run_until_hung(call) <= most


def test_bounds_come_from_the_cost_model_with_larger_clips_by_the_square():
    small, prices = planned(plan="large"), Prices()
    assert set(Bounds.of(prices, small).steps) == {None}
    prices.learn(small, {
        "denoise_steps_ms": [{"step": i, "duration_ms": 9000.0} for i in range(len(small.plan))],
        "steps": [{"name": n, "duration_ms": 8000.0} for n in ("encode", "decode", "write")],
    })  # fmt: skip
    same = Bounds.of(prices, small)
    assert set(same.steps) == {9000.0} and same.step(0, False) == 90.0
    assert set(same.stages.values()) == {8000.0}
    assert Bounds.of(prices, small, batch=3).steps[0] == 27_000.0
    wide = planned(plan="large", width=128)
    assert Bounds.of(prices, wide).steps[0] == pytest.approx(4 * 9000.0)


# --- the dispatcher, on workers that hang ---


class HangingRunner(FakeRunner):
    """Prompts that begin with "hang" never end; `kill` ends their worker, whose loading waits for
    `loaded`."""

    def __init__(self, **values):
        super().__init__(**values)
        self.killed, self.ends, self.loaded, self.down = [], {}, None, False
        self.hangs = 10**6  # how often "hang" hangs

    def unable(self):
        return "the worker is being started" if self.down else None

    async def prepare(self):
        if self.down:
            if self.loading is not None:
                raise self.loading
            await self.loaded.wait()
            self.down = False

    async def run(self, tasks, emit):
        if tasks[0].request.prompt.startswith("hang") and self.hangs:
            self.hangs -= 1
            self.begun += [t.request.prompt for t in tasks]
            emit({"id": tasks[0].id, "kind": "stage", "stage": "encode", "fresh": False})
            emit({"id": tasks[0].id, "kind": "step", "step": 1, "duration_ms": 1.0})
            self.ends = {t.id: asyncio.Event() for t in tasks}
            await self.ends[tasks[0].id].wait()
            raise WorkerLost("the worker ended with exit code -9")
        return await super().run(tasks, emit)

    def kill(self, job_id):
        self.killed.append(job_id)
        self.down = self.loaded is not None
        for event in self.ends.values():
            event.set()


def metric(address, name):
    lines = ask(address, "/metrics")[2].decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_a_cancelled_job_whose_worker_hangs_ends_as_cancelled_and_the_next_begins(tmp_path):
    with fake(tmp_path, HangingRunner(), step_timeout=0.3) as (address, server, runner):
        c = client(address)
        job = c.videos.create(prompt="hang").id
        after = c.videos.create(prompt="fine").id
        wait_for(lambda: runner.begun)
        row = ask(address, f"/v1/videos/{job}/cancel", "POST")[2]
        assert row["error"]["code"] == "cancelled"
        assert c.videos.poll(after).status == "completed"
        assert c.videos.retrieve(job).error.code == "cancelled" and runner.killed == [job]
        assert server.dispatcher.store.get(job).losses == 0
        assert metric(address, "nexus_rt_workers_hung_total") == 1.0


def test_a_worker_that_hangs_without_a_cancel_is_begun_again_with_its_job(tmp_path):
    runner = HangingRunner()
    runner.hangs = 1
    with fake(tmp_path, runner, step_timeout=0.3) as (address, server, _):
        done = client(address).videos.create_and_poll(prompt="hang once")
        assert done.status == "completed" and runner.begun == ["hang once"] * 2
        assert server.dispatcher.store.get(done.id).losses == 1
        runner.hangs = 10**6
        given_up = client(address).videos.create_and_poll(prompt="hang ever")
        assert given_up.error.code == "worker_lost" and "hung 3 times" in given_up.error.message


def test_the_other_jobs_of_a_batch_that_hangs_are_queued_again(tmp_path):
    runner = HangingRunner()
    with fake(tmp_path, runner, step_timeout=0.3, batch=2) as (address, server, _):
        runner.gate = asyncio.Event()
        c = client(address)
        c.videos.create(prompt="running")
        wait_for(lambda: runner.begun)
        one, two = (c.videos.create(prompt=f"hang {i}").id for i in range(2))
        runner.hangs = 1
        runner.gate.set()
        runner.gate = None
        wait_for(lambda: runner.ends)
        ask(address, f"/v1/videos/{one}/cancel", "POST")
        assert c.videos.poll(two).status == "completed"
        assert c.videos.retrieve(one).error.code == "cancelled"
        assert server.dispatcher.store.get(two).losses == 1


def test_a_deadline_ends_a_hang_too(tmp_path):
    runner = HangingRunner()
    with fake(tmp_path, runner, deadline=0.5, step_timeout=1.0) as (address, _, _):
        c = client(address)
        assert c.videos.create_and_poll(prompt="hang").error.code == "deadline_exceeded"
        wait_for(lambda: runner.killed)
        wait_for(lambda: ask(address, "/ready")[0] == 200)


def test_ready_is_503_with_the_reason_while_no_worker_can_take_a_job(tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_rt.serve.dispatcher.PATIENCE", (0.05, 0.1))
    runner = HangingRunner()
    with fake(tmp_path, runner, step_timeout=0.3) as (address, server, _):
        runner.loaded = asyncio.Event()
        job = client(address).videos.create(prompt="hang").id
        wait_for(lambda: runner.down)
        status, headers, answer = ask(address, "/ready")
        assert status == 503 and "started" in answer["reason"] and headers["Retry-After"]
        assert metric(address, "nexus_rt_ready") == 0.0
        runner.loading = NexusError("/srv/secret/path has no weights")
        runner.loaded.set()
        wait_for(lambda: server.dispatcher.problem)
        status, _, answer = ask(address, "/ready")
        assert (status, answer["status"]) == (503, "failed")
        assert "cannot be loaded" in answer["reason"] and "secret" not in answer["reason"]
        assert server.dispatcher.store.get(job).status == "queued"  # no attempt is spent on it
        runner.loading, runner.hangs = None, 0
        assert client(address).videos.poll(job).status == "completed"
        assert ask(address, "/ready")[0] == 200


@pytest.mark.slow
def test_a_hung_thread_is_said_and_holds_no_exit_up(tmp_path):
    """A pipeline of this process cannot be ended: the application is told to restart."""
    hold = threading.Event()
    pipe = NexusPipeline.from_pretrained()
    runner = ThreadRunner(pipe, warmup=False)
    server = NexusServer(runner, tmp_path / "store", step_timeout=0.2, grace=0.0)
    with serving(server) as address:
        wait_for(lambda: server.dispatcher.ready)

        def hang(tasks, emit):
            hold.wait(60)
            raise JobFailed("generation_failed", "it was let go")

        runner.served.run = hang
        client(address).videos.create(prompt=PROMPT)
        status = wait_for(lambda: (a := ask(address, "/ready")) and a[0] == 503 and a, 40)
        assert status[2]["status"] == "hung" and "nothing was heard" in status[2]["reason"]
        assert metric(address, "nexus_rt_workers_hung_total") == 1.0
        hold.set()


@pytest.mark.parametrize("odd", [0.0, -1.0, float("nan"), float("inf"), "soon", True])
def test_timeouts_are_checked(tmp_path, odd):
    code = "out_of_range" if type(odd) is float else "invalid_type"
    with refuses(code, "step_timeout", InputError):
        NexusServer(FakeRunner(), tmp_path / "store", step_timeout=odd)
    with refuses(code, "load_timeout", InputError):
        ProcessRunner(mini, None, load_timeout=odd)


# --- worker processes ---


def mini(argument):
    """The mini pair, for a worker process."""
    return NexusPipeline.from_pretrained()


def hanging(folder):
    """A pair whose first call of each file of `folder` hangs: "step", "decode" or "load"."""
    folder = Path(folder)
    pipe = mini(None)

    def first(name):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
            return True
        return False

    if first("load"):
        time.sleep(600)
    denoise, decode = generate.denoise, generate.decode

    def hang_denoise(components, planned, conditioning, noise, hooks):
        def on_step(step, latents):
            hooks.on_step(step, latents)
            if step.index == 1 and first("step"):
                signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
                time.sleep(600)

        hanging = dataclasses.replace(hooks, on_step=on_step)
        return denoise(components, planned, conditioning, noise, hanging)

    def hang_decode(*arguments, **named):
        if first("decode"):
            time.sleep(600)
        return decode(*arguments, **named)

    generate.denoise, generate.decode = hang_denoise, hang_decode
    return pipe


@linux
@pytest.mark.process
def test_a_real_worker_that_hangs_is_killed_and_begun_again(tmp_path):
    runner = ProcessRunner(hanging, str(tmp_path), warmup=True)
    server = NexusServer(runner, tmp_path / "store", step_timeout=1.0, attempts=3)
    with serving(server) as address:
        wait_for(lambda: server.dispatcher.ready, 60)
        c = client(address)
        (first,) = workers()
        (tmp_path / "step").touch()
        job = c.videos.create(prompt=PROMPT).id
        wait_for(lambda: not (tmp_path / "step").exists(), 30)
        after = c.videos.create(prompt=PROMPT).id
        assert ask(address, f"/v1/videos/{job}/cancel", "POST")[2]["error"]["code"] == "cancelled"
        wait_for(lambda: ask(address, "/ready")[0] == 503, 30)
        assert c.videos.poll(after).status == "completed"
        assert c.videos.retrieve(job).error.code == "cancelled"
        (second,) = workers()
        assert second != first and ask(address, "/ready")[0] == 200
        (tmp_path / "decode").touch()  # a hang that nobody cancels
        assert c.videos.create_and_poll(prompt=PROMPT).status == "completed"
        assert not (tmp_path / "decode").exists()
        assert metric(address, "nexus_rt_workers_hung_total") == 2.0
        os.kill(workers()[0], signal.SIGKILL)  # one without a job is begun again
        wait_for(lambda: ask(address, "/ready")[0] == 503, 30)
        wait_for(lambda: ask(address, "/ready")[0] == 200, 60)
    wait_for(lambda: not workers())


@linux
@pytest.mark.process
def test_loading_that_hangs_ends_within_its_own_bound(tmp_path):
    (tmp_path / "load").touch()

    async def start():
        runner = ProcessRunner(hanging, str(tmp_path), load_timeout=8.0)
        try:
            with refuses("timeout", "load_timeout"):
                await runner.start()
            assert runner.unable() and not workers()
        finally:
            await runner.close()

    asyncio.run(start())


def deaf(folder):
    """A pair whose worker does not read its pipe from its first step on, until a file is there; of
    a batch it runs two jobs."""
    from nexus_rt.serve.worker import Worker

    pipe = mini(None)
    go, begun = Path(folder) / "go", Path(folder) / "begun"
    pipe_recv = Worker.hear

    def hear(self):
        original = self.pipe.recv

        class Slow:
            def __getattr__(_, name):
                return getattr(self_pipe, name)

            def recv(_):
                message = original()
                if message[0] == "run":
                    self.todo.append(message[1][:2])
                    with self.arrived:
                        self.arrived.notify()
                    begun.touch()
                    while not go.exists():
                        time.sleep(0.01)
                    return original()
                return message

        self_pipe = self.pipe
        self.pipe = Slow()
        pipe_recv(self)

    Worker.hear = hear
    return pipe


@linux
@pytest.mark.process
def test_thousands_of_cancels_to_a_worker_that_does_not_read_leave_the_loop_free(tmp_path):
    """A socket's buffer takes some 278 of them."""

    async def run():
        runner = ProcessRunner(deaf, str(tmp_path), warmup=False)
        await runner.start()
        lags, stop = [], asyncio.Event()

        async def measure():
            while not stop.is_set():
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                lags.append(time.perf_counter() - before - 0.005)

        one = task(plan="reference", num_inference_steps=200)
        tasks = [dataclasses.replace(one, id=f"video_{i:032x}") for i in range(5000)]
        running = asyncio.create_task(runner.run(tasks, lambda event: None))
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.01)
        measuring = asyncio.create_task(measure())
        for i, of in enumerate(tasks):
            runner.cancel(of.id)
            if i % 50 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        (tmp_path / "go").touch()
        with pytest.raises(JobFailed) as stopped:
            await asyncio.wait_for(running, 60)
        assert stopped.value.code == "cancelled"
        stop.set()
        await measuring
        await runner.close()
        return lags

    lags = asyncio.run(run())
    assert len(lags) > 20 and max(lags) < 0.5, max(lags)
    assert not workers()
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        os.set_blocking(ours.fileno(), False)
        with pytest.raises(BlockingIOError):  # a pipe holds fewer
            for i in range(4000):
                ours.send(("cancel", f"video_{i:032x}"))


def test_a_job_is_cancelled_once_however_often_it_is_asked(tmp_path):
    runner = FakeRunner(steps=10_000, seconds=0.01)
    with fake(tmp_path, runner) as (address, _, _):
        times = []
        runner.cancel = lambda job_id: times.append(job_id)
        job = client(address).videos.create(prompt="x").id
        wait_for(lambda: runner.begun)
        for _ in range(50):
            assert ask(address, f"/v1/videos/{job}/cancel", "POST")[0] == 200
        assert times == [job]
        runner.cancelled.add(job)


@linux
@pytest.mark.process
def test_a_hung_workers_server_that_is_killed_leaves_no_orphan(tmp_path):
    """Not one of its threads hears that the pipe has ended."""
    import subprocess

    (tmp_path / "step").touch()
    script = (
        "import asyncio, sys\n"
        "from tests.test_serve_watch import *\n"
        "async def main():\n"
        "    runner = ProcessRunner(hanging, sys.argv[1], warmup=False)\n"
        "    await runner.start()\n"
        "    print(workers()[0], flush=True)\n"
        "    await runner.run([task()], lambda event: None)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    path = tmp_path / "server.py"
    path.write_text(script)
    server = subprocess.Popen(
        [sys.executable, str(path), str(tmp_path)],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, start_new_session=True,
    )  # fmt: skip
    worker = None

    def gone():
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    try:
        worker = int(server.stdout.readline())
        wait_for(lambda: not (tmp_path / "step").exists(), 60)
        os.kill(worker, signal.SIGSTOP)  # whatever it holds, it runs no line of Python any more
        server.kill()
        server.wait(10)
        wait_for(gone)
    finally:
        with contextlib.suppress(ProcessLookupError):
            if server.returncode is None:
                os.killpg(server.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            if not gone():
                os.killpg(worker, signal.SIGKILL)  # a worker makes a group of its own
        server.wait(10)
        server.stdout.close()


def test_a_log_that_nobody_reads_stops_nobody(monkeypatch):
    """A pipe is full after 64 KiB; a write to it waits for ever."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logs, "MAX_LINES", 2000)
        handler = logs.Unhurried()
        atexit.unregister(handler.drain)
        handler.setFormatter(logs.JsonLines())
        began = time.monotonic()
        for i in range(5000):
            row = {"name": "x", "msg": f"line {i} {'.' * 100}", "levelname": "INFO"}
            handler.emit(logging.makeLogRecord(row))
        assert time.monotonic() - began < 5.0 and handler.dropped > 1000
        text = b""
        while b"lines were dropped" not in text:
            text += os.read(read, 2**16)
        rows = [json.loads(line) for line in text.decode().splitlines()]
        assert rows[0]["event"].startswith("line 0 ") and rows[-1]["level"] == "warning"
        assert int(rows[-1]["event"].split()[0]) + len(rows) - 1 == 5000
        handler.drain()
    os.close(read)
