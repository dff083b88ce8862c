"""Replicas of the mini pair on a Ray of this machine."""

import os
import signal

import openai
import pytest

from nexus_rt.cli import parser
from nexus_rt.cli.serve import served_pipeline
from nexus_rt.errors import InputError
from nexus_rt.serve.ray_runner import RayRunner, parse_replicas
from nexus_rt.serve.server import NexusServer
from tests.serving import PROMPT, messages, serving, wait_for

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")

LONG = {"plan": "reference", "num_inference_steps": 2000}
SHORT = {"plan": "reference", "num_inference_steps": 40}


def test_the_queue_brings_a_second_replica_and_one_is_killed_in_a_job(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    args = parser().parse_args(["serve", "--ray", "--replicas", "1-2", "--no-warmup"])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
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
            assert c.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=50).status == (
                "completed"
            )
    finally:
        ray.shutdown()


def test_numbers_of_replicas():
    assert parse_replicas("3") == (3, 3) and parse_replicas("1-8") == (1, 8)
    for odd in ("0", "8-1", "many", "-1", "1-"):
        with pytest.raises(InputError, match="--replicas"):
            parse_replicas(odd)
