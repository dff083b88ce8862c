"""Replicas of the mini pair on a Ray of this machine."""

import asyncio
import contextlib
import os
import signal
import sqlite3
from pathlib import Path

import openai
import pytest

from nexus_rt.cli import parser
from nexus_rt.cli.serve import served_pipeline
from nexus_rt.core.errors import InputError
from nexus_rt.serve.ray_runner import Cancels, RayRunner, parse_replicas
from nexus_rt.serve.server import NexusServer
from tests.needs import needs
from tests.refusals import refuses
from tests.serving import PROMPT, ServerProcess, ask, messages, serving, wait_for
from tests.test_serve_watch import hanging

LONG = {"plan": "reference", "num_inference_steps": 2000}
SHORT = {"plan": "reference", "num_inference_steps": 40}


@pytest.mark.ray
def test_the_queue_brings_a_second_replica_and_one_is_killed_in_a_job(tmp_path, local_ray):
    args = parser().parse_args(["serve", "--ray", "--replicas", "1-2", "--no-warmup"])
    low, high = parse_replicas(args.replicas)
    runner = RayRunner(served_pipeline, args, low, high, warmup=not args.no_warmup)
    server = NexusServer(runner, tmp_path / "store", max_steps=2000)
    with serving(server) as address:
        wait_for(lambda: server.dispatcher.ready or server.dispatcher.problem, 90)
        assert server.dispatcher.problem is None
        c = openai.OpenAI(base_url=f"{address}/v1", api_key="none-asked", max_retries=0)
        holds = c.videos.create(prompt=PROMPT, extra_body=LONG).id
        wait_for(lambda: holds in runner.pids)
        job = c.videos.create(prompt=PROMPT, extra_body=SHORT).id
        wait_for(lambda: job in runner.pids, 60)  # the second replica
        assert runner.pids[job] != runner.pids[holds]
        stream = messages(address, f"/v1/videos/{job}/events")
        next(e for k, e in stream if k == "step")
        os.kill(runner.pids[job], signal.SIGKILL)
        assert c.videos.retrieve(holds).status == "in_progress"
        # a cancel frees its replica within a step, and the lost job has one again
        assert c.post(f"/videos/{holds}/cancel", cast_to=object)["status"] == "failed"
        done = c.videos.poll(job, poll_interval_ms=50)
        assert done.status == "completed", done.error
        ends = [k for k, _ in stream if k in ("completed", "failed")]
        assert ends == ["completed"]  # once
        lost = server.dispatcher.store.get(job)
        assert (lost.attempts, lost.losses) == (2, 1)
        assert c.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=50).status == ("completed")


def test_numbers_of_replicas():
    assert parse_replicas("3") == (3, 3) and parse_replicas("1-8") == (1, 8)
    for odd in ("0", "8-1", "many", "-1", "1-"):
        with refuses("invalid_value", "--replicas", InputError):
            parse_replicas(odd)


@pytest.mark.slow
@pytest.mark.ray
def test_a_replica_that_hangs_is_killed_and_another_takes_the_next_job(tmp_path, local_ray):
    runner = RayRunner(hanging, str(tmp_path), warmup=False)
    server = NexusServer(runner, tmp_path / "store", step_timeout=2.0)
    with serving(server) as address:
        wait_for(lambda: server.dispatcher.ready or server.dispatcher.problem, 90)
        assert server.dispatcher.problem is None
        c = openai.OpenAI(base_url=f"{address}/v1", api_key="none-asked", max_retries=0)
        (tmp_path / "step").touch()
        job = c.videos.create(prompt=PROMPT).id
        wait_for(lambda: not (tmp_path / "step").exists(), 30)
        pid = runner.pids[job]
        assert c.post(f"/videos/{job}/cancel", cast_to=object)["status"] == "failed"
        done = c.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=50)
        assert done.status == "completed", done.error
        assert c.videos.retrieve(job).error.code == "cancelled"
        assert not Path(f"/proc/{pid}").exists()
        text = ask(address, "/metrics")[2].decode()
        assert "nexus_rt_workers_hung_total 1.0" in text


def test_cancels_reach_those_who_wait_for_them():
    async def run():
        cancels = Cancels()
        waiting = asyncio.create_task(cancels.wait(["a", "b"], set()))
        await asyncio.sleep(0)
        await cancels.cancel("elsewhere")
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await cancels.cancel("b")
        assert await waiting == {"b"}
        more = asyncio.create_task(cancels.wait(["a", "b"], {"b"}))
        await cancels.cancel("a")
        assert await more == {"a", "b"}
        await cancels.forget(["a", "b", "elsewhere"])
        assert not cancels.ids

    asyncio.run(run())


@pytest.mark.parametrize("grace", ["0", "60"])
@pytest.mark.slow
@pytest.mark.ray
def test_sigterm_ends_a_server_of_replicas_in_order(tmp_path, grace):
    """Ray's core has a handler of its own for SIGTERM, which aborts."""
    needs("ray")
    env = {"RAY_USAGE_STATS_ENABLED": "0"}
    arguments = ["--ray", "--no-warmup", "--grace", grace, "--max-steps", "2000"]
    steps = {"0": 2000, "60": 60}[grace]
    with ServerProcess(tmp_path / "store", *arguments, env=env) as server:
        server.ready(120)
        c = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none-asked", max_retries=0)
        job = c.videos.create(
            prompt=PROMPT, extra_body={"plan": "large", "num_inference_steps": steps}
        )
        stream = messages(server.address, f"/v1/videos/{job.id}/events")
        next(e for k, e in stream if k == "step")
        assert server.end(signal.SIGTERM, 90) == 0, server.log.read_text()[-2000:]
    assert "SIGTERM" not in server.log.read_text()
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "jobs.sqlite")) as db:
        (row,) = db.execute("SELECT status, losses FROM jobs").fetchall()
    assert row == ({"0": "queued", "60": "completed"}[grace], 0)
