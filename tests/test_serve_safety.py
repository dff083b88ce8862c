"""Metrics, logs, keys, other sites, slow clients; inside another application."""

import asyncio
import importlib
import io
import json
import logging
import re
import socket

import openai
import pytest

from nexus_rt.core.errors import InputError
from nexus_rt.serve.logs import JsonLines
from nexus_rt.serve.server import NexusServer
from tests.needs import needs
from tests.refusals import refuses
from tests.serving import (
    FakeRunner,
    ask,
    client,
    fake,
    mini_profile,
    serving,
    wait_for,
)

# --- operations ---


def test_metrics_and_perf(tmp_path):
    with fake(tmp_path) as (address, _, _):
        c = client(address)
        done = c.videos.create_and_poll(prompt="x")
        c.videos.create_and_poll(prompt="fail out_of_memory")
        perf = ask(address, f"/v1/perf/{done.id}")[2]
        assert set(perf) == {
            "total_duration_ms", "steps", "denoise_steps_ms", "memory_checkpoints", "meta",
        }  # fmt: skip
        assert all(set(row) == {"name", "duration_ms"} for row in perf["steps"])
        assert all(set(row) == {"step", "duration_ms"} for row in perf["denoise_steps_ms"])
        _status, headers, text = ask(address, "/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = text.decode().splitlines()
        for line in (
            'nexus_rt_jobs{status="completed"} 1.0',
            'nexus_rt_jobs{status="failed"} 1.0',
            'nexus_rt_jobs{status="queued"} 0.0',
            'nexus_rt_jobs_ended_total{kind="completed"} 1.0',
            'nexus_rt_jobs_ended_total{kind="out_of_memory"} 1.0',
            "nexus_rt_queue_wait_seconds_count 2.0",
            "nexus_rt_job_seconds_count 1.0",
            'nexus_rt_step_seconds_count{kind="small:2"} 6.0',
            'nexus_rt_stage_seconds_count{stage="decode"} 1.0',
            "nexus_rt_ready 1.0",
            "nexus_rt_residency_moves_total 0.0",
        ):
            assert line in lines, line
        assert re.search(
            r'nexus_rt_memory_bytes\{kind="rss",process="server"\} [1-9]', text.decode()
        )
        routes = re.findall(r'nexus_rt_http_seconds_count\{route="([^"]+)"', text.decode())
        assert "/v1/videos/{id}" in routes and not any("video_" in r for r in routes)


def test_logs_are_json_and_hold_no_prompt_unless_asked(tmp_path):
    for asked in (False, True):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonLines())
        logger = logging.getLogger("nexus_rt.serve")
        logger.addHandler(handler)
        before, level = logger.level, logging.INFO
        logger.setLevel(level)
        try:
            with fake(tmp_path / str(asked), log_prompts=asked) as (address, _, _):
                client(address).videos.create_and_poll(prompt="a secret wish")
                ask(address, "/v1/videos", "POST", {"prompt": "a secret wish", "size": "1"})
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
        rows = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert {"queued", "completed", "request"} <= {row["event"] for row in rows}
        assert all({"time", "level", "logger"} <= set(row) for row in rows)
        assert ("secret" in stream.getvalue()) is asked
        statuses = [(r["method"], r["route"], r["status"]) for r in rows if r["event"] == "request"]
        assert ("POST", "/v1/videos", 400) in statuses


# --- safety ---


def test_keys_are_wanted_and_separate(tmp_path):
    keys = ("first-key-12", "second-key-12")
    with fake(tmp_path, api_keys=keys) as (address, _, _):
        for key in ("wrong-key-12", "first-key-1", "first-key-123"):
            with pytest.raises(openai.AuthenticationError) as refused:
                client(address, key).videos.list()
            assert refused.value.code == "invalid_api_key"
        one, two = (client(address, key) for key in keys)
        job = one.videos.create_and_poll(prompt="x")
        for call in (two.videos.retrieve, two.videos.download_content, two.videos.delete):
            with pytest.raises(openai.NotFoundError):
                call(job.id)
        assert not two.videos.list().data and one.videos.list().data
        for path in ("/metrics", "/v1/models", "/v1/plan", f"/v1/perf/{job.id}"):
            assert ask(address, path)[0] == 401
        for path in ("/health", "/ready", "/", "/page.js"):
            assert ask(address, path)[0] == 200


def test_without_keys_pages_of_other_sites_are_refused(tmp_path):
    with fake(tmp_path) as (address, server, _):
        port = address.rpartition(":")[2]
        for headers, status in (
            ({"Host": "evil.example"}, 403),
            ({"Host": f"evil.example:{port}"}, 403),
            ({"Host": "[::1"}, 403),
            ({"Host": f"localhost:{port}"}, 200),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": address}, 200),
        ):
            got, _, answer = ask(address, "/v1/videos", "POST", {"prompt": "x"}, headers)
            assert got == status, (headers, answer)
        assert sum(server.dispatcher.store.counts().values()) == 2


def test_settings_are_checked(tmp_path):
    for name, value, code in (
        ("host", "0.0.0.0", "missing"),  # an API key
        ("host", "example.com", "missing"),
        ("api_keys", ("short",), "invalid_value"),
        ("api_keys", ("has a space in it",), "invalid_value"),
        ("max_queue", 0, "out_of_range"),
        ("deadline", float("nan"), "out_of_range"),
        ("quota", "lots", "invalid_value"),
        ("models", ("a b",), "invalid_value"),
        ("models", (), "invalid_value"),
        ("lora_folder", tmp_path / "absent", "not_found"),
        ("port", 70_000, "out_of_range"),
        ("fps", "fast", "out_of_range"),
        ("max_connections", 0, "out_of_range"),
        ("max_connections_per_address", -1, "out_of_range"),
        ("trusted_proxies", ("a proxy",), "invalid_value"),
    ):
        param = "api_keys" if name == "host" else name
        with refuses(code, param, InputError):
            NexusServer(FakeRunner(), tmp_path / "store", **{name: value})
    server = NexusServer(
        FakeRunner(), tmp_path / "store", host="0.0.0.0", api_keys=("a-long-key-1",)
    )
    assert "a-long-key" not in repr(server.settings)
    with refuses("missing", "lifespan", InputError):
        _ = server.dispatcher


def test_a_store_is_one_servers(tmp_path):
    with fake(tmp_path):
        second = NexusServer(FakeRunner(), tmp_path / "store")
        with refuses("in_use", "store", InputError):
            asyncio.run(second.start())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "jobs.sqlite").write_bytes(b"no database" * 1000)
    broken = NexusServer(FakeRunner(), tmp_path / "damaged")
    with refuses("unreadable", "store"):
        asyncio.run(broken.start())


@pytest.mark.parametrize("parser", ["h11_impl.H11Protocol", "httptools_impl.HttpToolsProtocol"])
def test_a_slow_body_is_answered_with_408(tmp_path, monkeypatch, parser):
    from nexus_rt.serve import bodies

    module, _, name = parser.partition(".")
    protocol = getattr(importlib.import_module(f"uvicorn.protocols.http.{module}"), name)
    monkeypatch.setattr("uvicorn.protocols.http.auto.AutoHTTPProtocol", protocol)
    monkeypatch.setattr(bodies, "SECONDS", 0.2)
    with fake(tmp_path) as (address, _, _):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(
                b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                b"\r\nContent-Length: 1000\r\n\r\n{"
            )
            assert ask(address, "/health")[0] == 200
            assert slow.recv(200).startswith(b"HTTP/1.1 408")


# --- inside another application ---


def test_inside_a_fastapi_application(tmp_path):
    needs("fastapi")
    from fastapi import FastAPI

    for mounted in (True, False):
        server = NexusServer(FakeRunner(), tmp_path / str(mounted))
        app = FastAPI(lifespan=server.lifespan)

        @app.get("/own")
        def own():
            return {"own": True}

        if mounted:
            app.mount("/video", server.app)
        else:
            app.router.routes.extend(server.routes)
        with serving(server, app) as address:
            wait_for(lambda s=server: s.dispatcher.ready)
            prefix = "/video" if mounted else ""
            assert ask(address, "/own")[2] == {"own": True}
            done = client(address + prefix).videos.create_and_poll(prompt="x")
            assert done.status == "completed"
            status, headers, _ = ask(address, f"{prefix}/")
            assert status == 200 and "script-src 'self'" in headers["Content-Security-Policy"]


def test_engines_say_what_they_were_built_for(tmp_path):
    from nexus_rt.core.size import BuiltSizes, ClipSize

    built = (BuiltSizes("small", (ClipSize(64, 64, 17),)),)
    defaults = mini_profile().defaults.replace(plan="small")
    profile = mini_profile(built_sizes=built, loras=False, generators=("small",), defaults=defaults)
    (tmp_path / "ink.safetensors").write_bytes(b"")
    with fake(tmp_path, FakeRunner(profile=profile), lora_folder=tmp_path) as made:
        address = made[0]
        post = lambda body: ask(address, "/v1/videos", "POST", {"prompt": "x", **body})
        assert post({})[0] == 200
        status, _, answer = post({"size": "80x64"})
        assert status == 400 and answer["error"]["param"] == "size"
        assert "64x64x17" in answer["error"]["message"]
        assert post({"plan": "large"})[2]["error"]["param"] == "plan"
        assert post({"lora": "ink"})[2]["error"]["param"] == "lora"
