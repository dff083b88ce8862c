"""`nexus-rt serve` as its own process, on the mini pair."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

from nexus_rt.cli import main
from nexus_rt.loading.lora import PACKAGED
from nexus_rt.media.reading import read_frames, read_metadata
from nexus_rt.pipeline.pipeline import NexusPipeline
from tests.serving import PROMPT, ServerProcess, ask, free_port, messages, wait_for

LONG = {"plan": "reference", "num_inference_steps": 80}  # some two seconds
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def client(server, key="nobody-asks"):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0)


def worker_of(server) -> int:
    """The process that holds the models."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
            if parent == server.process.pid and b"spawn_main" in command:
                return int(stat.parent.name)
    raise AssertionError("no worker")


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "loras").mkdir()
    source = PACKAGED / "few_step.safetensors"
    (folder / "loras" / "few_step.safetensors").symlink_to(source)
    keys = {"NEXUS_RT_API_KEY": "from-the-environment,and-another-1"}
    arguments = ["--lora-dir", str(folder / "loras"), "--batch", "2"]
    with ServerProcess(folder / "store", *arguments, env=keys) as process:
        yield process.ready()


KEY = "from-the-environment"


@pytest.mark.process
def test_the_clip_is_what_generate_makes(server, tmp_path):
    c = client(server, KEY)
    done = c.videos.create_and_poll(prompt=PROMPT, extra_body={"seed": 5}, poll_interval_ms=50)
    assert done.status == "completed", done.error
    assert done.completed_at - done.created_at < 30
    path = tmp_path / "served.mp4"
    c.videos.download_content(done.id).write_to_file(path)
    pipe = NexusPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    made = pipe(PROMPT, generator=torch.Generator().manual_seed(5)).frames[0]
    assert np.abs(read_frames(path) / 255 - made).mean() < 0.02
    assert read_metadata(path)["seed"] == 5
    from PIL import Image

    still = Image.open(io.BytesIO(c.videos.download_content(done.id, variant="thumbnail").read()))
    sheet = c.videos.download_content(done.id, variant="spritesheet").read()
    assert still.format == "WEBP" and still.size == (64, 64)
    assert Image.open(io.BytesIO(sheet)).size == (8 * 64, 2 * 64)
    perf = ask(server.address, f"/v1/perf/{done.id}", headers=bearer())[2]
    assert (
        perf["meta"]["plan"] == made_plan(pipe) and perf["memory_checkpoints"]["decode"]["rss_mb"]
    )


def made_plan(pipe):
    return pipe.make_plan().name


def bearer():
    return {"Authorization": f"Bearer {KEY}"}


@pytest.mark.process
def test_previews_and_the_time_left_as_it_runs(server):
    c = client(server, KEY)
    job = c.videos.create(prompt=PROMPT, extra_body={"plan": "reference"})
    events = list(messages(server.address, f"/v1/videos/{job.id}/events", bearer()))
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "state" and kinds[-1] == "completed"
    steps = [e for k, e in events if k == "step"]
    previews = [e for k, e in events if k == "preview"]
    assert len(steps) >= 10 and previews  # a slow reader misses some, never the last
    assert steps[-1]["step"] == steps[-1]["steps"] == 20
    assert {e["phase"] for e in steps} == {"bridge"}
    left = [e["ms_left"] for e in steps]
    assert left == sorted(left, reverse=True) and left[-1] > 0
    assert next(e for k, e in events if k == "rewriting")["text"]
    total = ask(server.address, f"/v1/perf/{job.id}", headers=bearer())[2]["total_duration_ms"]
    assert left[0] < 20 * total  # of the warm-up, on a machine that does other things too


@pytest.mark.process
def test_loras_by_name(server):
    c = client(server, KEY)
    body = {"seed": 5, "lora": "few_step", "plan": "small:8 large:*@1", "num_inference_steps": 11}
    done = c.videos.create_and_poll(prompt=PROMPT, extra_body=body, poll_interval_ms=50)
    assert done.status == "completed", done.error
    perf = ask(server.address, f"/v1/perf/{done.id}", headers=bearer())[2]
    assert perf["meta"]["loras"] == ["large:few_step@1"]


@pytest.mark.process
def test_cancel_stops_the_worker_within_a_step(server):
    c = client(server, KEY)
    job = c.videos.create(prompt=PROMPT, extra_body={**LONG, "num_inference_steps": 400})
    stream = messages(server.address, f"/v1/videos/{job.id}/events", bearer())
    assert next(e for k, e in stream if k == "step")
    began = time.monotonic()
    row = ask(server.address, f"/v1/videos/{job.id}/cancel", "POST", headers=bearer())[2]
    assert row["error"]["code"] == "cancelled" and list(stream)[-1][0] == "failed"
    after = c.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=20)
    assert after.status == "completed" and time.monotonic() - began < 4.0  # not 400 steps


@pytest.mark.process
def test_a_killed_worker_costs_nothing_but_time(server):
    c = client(server, KEY)
    job = c.videos.create(prompt=PROMPT, extra_body=LONG)
    stream = messages(server.address, f"/v1/videos/{job.id}/events", bearer())
    next(e for k, e in stream if k == "step")
    before = worker_of(server)
    os.kill(before, signal.SIGKILL)
    done = c.videos.poll(job.id, poll_interval_ms=50)
    assert done.status == "completed" and worker_of(server) != before
    assert [k for k, _ in stream if k in ("completed", "failed")] == ["completed"]
    text = ask(server.address, "/metrics", headers=bearer())[2].decode()
    assert "nexus_rt_workers_lost_total 1.0" in text


@pytest.mark.process
def test_two_at_a_time_are_one_batch(server):
    c = client(server, KEY)
    first = c.videos.create(prompt=PROMPT, extra_body=LONG)
    others = [c.videos.create(prompt=PROMPT, extra_body={"seed": i}) for i in range(2)]
    c.videos.delete(first.id)
    rows = [c.videos.poll(v.id, poll_interval_ms=20) for v in others]
    assert [r.status for r in rows] == ["completed"] * 2
    batches = [
        ask(server.address, f"/v1/perf/{v.id}", headers=bearer())[2]["meta"]["batch"]
        for v in others
    ]
    assert batches == [2, 2]


@pytest.mark.process
def test_the_log_is_json_without_prompts_or_keys(server):
    rows = server.rows()
    assert {"ready", "queued", "completed", "failed", "request", "worker lost: "
            "the worker ended with exit code -9"} <= {r["event"] for r in rows}  # fmt: skip
    text = server.log.read_text()
    assert "striped" not in text and KEY not in text


@pytest.mark.process
def test_a_second_signal_ends_at_once(server):
    job = client(server, KEY).videos.create(prompt=PROMPT, extra_body={**LONG, "priority": 9})
    stream = messages(server.address, f"/v1/videos/{job.id}/events", bearer())
    next(e for k, e in stream if k == "step")
    worker, began = worker_of(server), time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert list(stream)[-1][0] == "closed"  # the first one waits for the job
    assert server.end(signal.SIGINT) == 128 + signal.SIGINT
    wait_for(lambda: gone(worker))
    assert time.monotonic() - began < 3.0
    assert "Traceback" not in server.log.read_text() and "leaked" not in server.log.read_text()


@pytest.mark.process
def test_killed_in_a_job_it_restarts_with_nothing_lost(tmp_path):
    port = free_port()
    with ServerProcess(tmp_path / "store", port=port) as first:
        c = client(first.ready())
        kept = c.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=50)
        ids = [c.videos.create(prompt=PROMPT, extra_body=LONG).id for _ in range(1)]
        ids += [c.videos.create(prompt=PROMPT, extra_body={"seed": i}).id for i in range(2)]
        wait_for(lambda: c.videos.retrieve(ids[0]).progress > 5)
        worker = worker_of(first)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        wait_for(lambda: gone(worker))  # no orphan goes on with the models
    with ServerProcess(tmp_path / "store", port=port) as second:
        c = client(second.ready())
        assert c.videos.retrieve(kept.id).status == "completed"
        assert len(c.videos.download_content(kept.id).read()) > 1000
        assert [v.id for v in c.videos.list(order="asc")] == [kept.id, *ids]
        rows = [c.videos.poll(i, poll_interval_ms=50) for i in ids]
        assert [r.status for r in rows] == ["completed"] * 3
        # another server on the same folder is refused
        refused = subprocess.run(
            [sys.executable, "-m", "nexus_rt.cli", "serve", "--store", str(tmp_path / "store"),
             "--port", str(free_port())],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert refused.returncode != 0 and "another server works on" in refused.stderr
        # a stop lets the running job end
        last = c.videos.create(prompt=PROMPT, extra_body={**LONG, "num_inference_steps": 30}).id
        waits = c.videos.create(prompt=PROMPT).id
        stream = messages(second.address, f"/v1/videos/{last}/events")
        next(e for k, e in stream if k == "step")
        second.process.send_signal(signal.SIGTERM)
        assert list(stream)[-1][0] == "closed"
        assert second.process.wait(30) == 0
    import sqlite3

    rows = dict(
        sqlite3.connect(tmp_path / "store" / "jobs.sqlite").execute("SELECT id, status FROM jobs")
    )
    assert rows[last] == "completed" and rows[waits] == "queued"
    assert (tmp_path / "store" / "videos" / last / "video.mp4").is_file()


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--host", "0.0.0.0"], "pass an API key", 2),
        (["--pair", "/nowhere/at/all"], "/nowhere/at/all", 1),
        (["--replicas", "2"], "--replicas goes with --ray", 2),
        (["--lora-dir", "/nowhere"], "lora folder", 2),
        (["--max-size", "big"], "WIDTHxHEIGHTxFRAMES", 2),
        (["--api-key-file", "/nowhere"], "--api-key-file cannot be read", 2),
        (["--plan", "small:2 large:3"], "segments have 5 steps", 1),
    ],
)
def test_what_cannot_be_served_is_said_and_ends(
    tmp_path, capsys, monkeypatch, arguments, words, code
):
    monkeypatch.setenv("NEXUS_RT_API_KEY", "")
    store = ["--store", str(tmp_path / "store"), "--port", str(free_port())]
    loggers = [logging.getLogger(name) for name in ("nexus_rt", "uvicorn")]
    before = [(log, list(log.handlers), log.level, log.propagate) for log in loggers]
    try:
        assert main(["serve", *store, *arguments]) == code
    finally:
        for log, handlers, level, propagate in before:
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed
