import asyncio
import io
import json
import logging
import re
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest
from openai.types import Model, Video, VideoDeleteResponse

from nexus_rt.errors import InputError, ModelError
from nexus_rt.serve.logs import JsonLines
from nexus_rt.serve.server import NexusServer
from tests.serving import (
    PROMPT,
    FakeRunner,
    ask,
    fake,
    messages,
    mini_profile,
    serving,
    wait_for,
)

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
    if row["status"] == "completed":
        assert row["progress"] == 100 and row["expires_at"] > row["completed_at"]
    return row


# --- the official client ---


def test_the_official_client_from_creation_to_deletion(tmp_path):
    with fake(tmp_path) as (address, _, _):
        c = client(address)
        made = c.videos.create(prompt=PROMPT, model="nexus-rt", seconds="1", size="64x64")
        check_video(made.to_dict())
        assert (made.status, made.progress, made.seconds, made.size) == ("queued", 0, "1", "64x64")
        done = c.videos.poll(made.id)
        check_video(done.to_dict())
        assert done.status == "completed" and done.prompt == PROMPT
        assert check_video(c.videos.retrieve(made.id).to_dict())["id"] == made.id
        video = c.videos.download_content(made.id)
        assert video.response.headers["content-type"] == "video/mp4"
        assert len(video.read()) == 1000
        kinds = {"thumbnail": b"webp", "spritesheet": b"jpeg"}
        for variant, content in kinds.items():
            assert c.videos.download_content(made.id, variant=variant).read() == content
        remixed = c.videos.remix(made.id, prompt="a blue star")
        assert remixed.remixed_from_video_id == made.id and remixed.prompt == "a blue star"
        assert (remixed.size, remixed.seconds) == (made.size, made.seconds)
        c.videos.poll(remixed.id)
        meta = [ask(address, f"/v1/perf/{i}")[2]["meta"]["seed"] for i in (made.id, remixed.id)]
        assert meta[0] == meta[1]  # the same seed
        gone = c.videos.delete(made.id)
        VideoDeleteResponse.model_validate(gone.to_dict(), strict=True)
        assert gone.to_dict() == {"id": made.id, "object": "video.deleted", "deleted": True}
        with pytest.raises(openai.NotFoundError) as refused:
            c.videos.retrieve(made.id)
        assert refused.value.code == "video_not_found" and refused.value.request_id
        assert [v.id for v in c.videos.list()] == [remixed.id]


def test_create_and_poll_waits_as_the_server_says(tmp_path):
    with fake(tmp_path, FakeRunner(seconds=0.01)) as (address, _, _):
        began = time.monotonic()
        patient = client(address, impatient=False)
        done = patient.videos.create_and_poll(prompt=PROMPT)
        assert done.status == "completed"
        raw = patient.videos.with_raw_response.create(prompt=PROMPT)
        assert int(raw.headers["openai-poll-after-ms"]) >= 100
        assert time.monotonic() - began < 10


def test_a_failed_job_is_an_answer_and_no_http_error(tmp_path):
    with fake(tmp_path) as (address, _, _):
        failed = client(address).videos.create_and_poll(prompt="fail not_finite")
        row = check_video(failed.to_dict())
        assert failed.status == "failed"
        assert row["error"] == {"code": "not_finite", "message": "it failed, as asked"}
        assert ask(address, f"/v1/videos/{failed.id}")[0] == 200
        with pytest.raises(openai.NotFoundError) as refused:
            client(address).videos.download_content(failed.id)
        assert "it failed, as asked" in str(refused.value)


def test_the_async_client_pages_through_everything(tmp_path):
    async def run(address):
        c = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none-asked", max_retries=0)
        made = [(await c.videos.create(prompt=f"clip {i}")).id for i in range(7)]
        newest = [v.id async for v in c.videos.list(limit=2)]
        oldest = [v.id async for v in c.videos.list(limit=3, order="asc")]
        await c.videos.poll(made[-1])
        await c.close()
        return made, newest, oldest

    with fake(tmp_path) as (address, _, _):
        made, newest, oldest = asyncio.run(run(address))
        assert oldest == made and newest == made[::-1]
        page = client(address).videos.list(limit=3, after=made[2], order="asc").to_dict()
        assert page["object"] == "list" and page["has_more"] is True
        assert (page["first_id"], page["last_id"]) == (made[3], made[5])
        assert [check_video(v)["id"] for v in page["data"]] == made[3:6]
        empty = ask(address, "/v1/videos?limit=0")[2]
        assert empty["data"] == [] and empty["has_more"] is True
        last = client(address).videos.list(limit=3, after=made[5], order="asc").to_dict()
        assert last["has_more"] is False and len(last["data"]) == 1
        none = ask(address, f"/v1/videos?after={made[0]}")[2]
        assert none == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
        }  # fmt: skip


def test_models_health_and_ready(tmp_path):
    with fake(tmp_path, models=("nexus-rt", "sora-2")) as (address, _, _):
        c = client(address)
        assert [m.id for m in c.models.list()] == ["nexus-rt", "sora-2"]
        Model.model_validate(c.models.retrieve("sora-2").to_dict(), strict=True)
        assert c.videos.create(prompt=PROMPT, model="sora-2").model == "sora-2"
        with pytest.raises(openai.NotFoundError):
            c.models.retrieve("gpt-4")
        assert ask(address, "/health")[2] == {"status": "ok"}
        assert ask(address, "/ready")[2] == {"status": "ready"}


def test_not_ready_while_loading_and_while_it_cannot(tmp_path):
    runner = FakeRunner()
    runner.loading = ModelError("no such weights")
    with fake(tmp_path, runner, ready=False) as (address, server, _):
        wait_for(lambda: server.dispatcher.problem)
        status, headers, body = ask(address, "/ready")
        assert (status, body["status"]) == (503, "failed") and headers["Retry-After"]
        status, headers, body = ask(address, "/v1/videos", "POST", {"prompt": "x"})
        assert (status, body["error"]["code"]) == (503, "not_ready")
        assert "no such weights" in body["error"]["message"] and headers["Retry-After"]
        assert ask(address, "/health")[0] == 200
        runner.loading = None  # it is tried again
        wait_for(lambda: server.dispatcher.ready)
        assert ask(address, "/v1/videos", "POST", {"prompt": "x"})[0] == 200


# --- what is read ---


def stored(server, video_id):
    return server.dispatcher.store.get(video_id).request


def test_forms_and_json_are_read_alike(tmp_path):
    lora = tmp_path / "loras"
    lora.mkdir()
    (lora / "ink.safetensors").write_bytes(b"")
    fields = {
        "num_frames": 5, "fps": 24, "seed": 7, "plan": "small:4 large:*", "guidance_scale": 3.5,
        "negative_prompt": "blur", "num_inference_steps": 8, "lora": ["ink@0.5", "small:ink"],
    }  # fmt: skip
    with fake(tmp_path, lora_folder=lora) as (address, server, _):
        form = client(address).videos.create(prompt=PROMPT, size="80x64", extra_body=fields)
        body = {"prompt": PROMPT, "size": "80x64", **fields}
        status, _, row = ask(address, "/v1/videos", "POST", body)
        assert status == 200
        assert stored(server, form.id) == stored(server, row["id"])
        kept = stored(server, form.id)
        assert kept["loras"] == ["large:ink@0.5", "small:ink@1"]
        for name in ("num_frames", "seed", "plan", "guidance_scale", "num_inference_steps"):
            assert kept[name] == fields[name]
        assert (kept["width"], kept["height"], kept["fps"]) == (80, 64, "24")
        assert row["seconds"] == f"{5 / 24:g}"
        encoded = b"prompt=a+star&seed=3"
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        row = ask(address, "/v1/videos", "POST", encoded, kind)[2]
        assert (stored(server, row["id"])["prompt"], stored(server, row["id"])["seed"]) == (
            "a star", 3,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "frames"), [("1", 17), ("4", 65), (5, 81), ("0.1", 1), ("2.5", 41)]
)
def test_seconds_are_the_nearest_frames_and_answered_as_asked(tmp_path, seconds, frames):
    with fake(tmp_path) as (address, server, _):
        row = ask(address, "/v1/videos", "POST", {"prompt": "x", "seconds": seconds})[2]
        assert row["seconds"] == str(seconds)
        assert stored(server, row["id"])["num_frames"] == frames


def test_a_job_without_a_seed_draws_one_that_javascript_can_hold(tmp_path):
    with fake(tmp_path) as (address, server, _):
        rows = [ask(address, "/v1/videos", "POST", {"prompt": "x"})[2] for _ in range(3)]
        seeds = {stored(server, r["id"])["seed"] for r in rows}
        assert len(seeds) == 3 and max(seeds) < 2**53


BAD = [
    ({}, "prompt", "missing_parameter"),
    ({"prompt": " "}, "prompt", "invalid_value"),
    ({"prompt": 3}, "prompt", "invalid_value"),
    ({"prompt": "x" * 32_001}, "prompt", "string_too_long"),
    ({"prompt": "\ud800"}, "prompt", "invalid_value"),
    ({"prompt": "x", "size": "64"}, "size", "invalid_value"),
    ({"prompt": "x", "size": "65x64"}, "size", "invalid_value"),
    ({"prompt": "x", "size": "0x0"}, "size", "invalid_value"),
    ({"prompt": "x", "size": "16384x16384"}, "size", "clip_too_large"),
    ({"prompt": "x", "seconds": "long"}, "seconds", "invalid_value"),
    ({"prompt": "x", "seconds": True}, "seconds", "invalid_value"),
    ({"prompt": "x", "seconds": "-1"}, "seconds", "invalid_value"),
    ({"prompt": "x", "seconds": "1", "num_frames": 17}, "seconds", "invalid_value"),
    ({"prompt": "x", "num_frames": 18}, "num_frames", "invalid_value"),
    ({"prompt": "x", "num_frames": "many"}, "num_frames", "invalid_value"),
    ({"prompt": "x", "num_frames": True}, "num_frames", "invalid_value"),
    ({"prompt": "x", "fps": 0}, "fps", "invalid_value"),
    ({"prompt": "x", "seed": 1.5}, "seed", "invalid_value"),
    ({"prompt": "x", "seed": 2**64}, "seed", "invalid_value"),
    ({"prompt": "x", "plan": "fast"}, "plan", "invalid_value"),
    ({"prompt": "x", "plan": 3}, "plan", "invalid_value"),
    ({"prompt": "x", "plan": "@/etc/passwd:3"}, "plan", "invalid_value"),
    ({"prompt": "x", "guidance_scale": "nan"}, "guidance_scale", "invalid_value"),
    ({"prompt": "x", "guidance_scale": [1]}, "guidance_scale", "invalid_value"),
    ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
    ({"prompt": "x", "solver": "ddim"}, "solver", "invalid_value"),
    ({"prompt": "x", "rewrite": ""}, "rewrite", "invalid_value"),
    ({"prompt": "x", "rewrite": "auto", "plan": "small"}, "rewrite", "invalid_value"),
    ({"prompt": "x", "priority": 11}, "priority", "invalid_value"),
    ({"prompt": "x", "deadline": 1e9}, "deadline", "invalid_value"),
    ({"prompt": "x", "lora": "../../etc/passwd"}, "lora", "lora_not_found"),
    ({"prompt": "x", "lora": "ink"}, "lora", "lora_not_found"),
    ({"prompt": "x", "lora": {"a": 1}}, "lora", "invalid_value"),
    ({"prompt": "x", "n": 2}, "n", "unknown_parameter"),
    ({"prompt": "x", "\ud800": 2}, "\\ud800", "unknown_parameter"),
    ({"prompt": "x", "negative_prompt": "\ud800"}, "negative_prompt", "invalid_value"),
    ({"prompt": "x", "plan": "\udfff"}, "plan", "invalid_value"),
    ({"prompt": "x", "size": "\ud800"}, "size", "invalid_value"),
    ({"prompt": "x", "lora": "\ud800"}, "lora", "lora_not_found"),
    ({"prompt": "x", "input_reference": {"image_url": "data:"}}, "input_reference",
     "unsupported_input"),
    ([], None, "invalid_body"),
]  # fmt: skip


def test_what_is_wrong_is_said_in_openais_shape_with_its_field(tmp_path):
    with fake(tmp_path) as (address, server, _):
        for body, param, code in BAD:
            status, headers, answer = ask(address, "/v1/videos", "POST", body)
            assert status == 400, (body, answer)
            error = answer["error"]
            assert set(answer) == {"error"} and set(error) == {"message", "type", "param", "code"}
            assert (error["param"], error["code"]) == (param, code), (body, error)
            assert error["type"] == "invalid_request_error" and error["message"]
            assert headers["x-request-id"]
        with pytest.raises(openai.NotFoundError) as refused:
            client(address).videos.create(prompt="x", model="sora-9")
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert sum(server.dispatcher.store.counts().values()) == 0


def test_image_and_video_inputs_are_a_clear_400(tmp_path):
    with fake(tmp_path, max_body=2**16) as (address, _, _):
        c = client(address)
        for size in (100, 5_000_000):  # also where the body is larger than may be
            picture = ("cat.png", io.BytesIO(bytes(size)), "image/png")
            with pytest.raises(openai.BadRequestError) as refused:
                c.videos.create(prompt="x", input_reference=picture)
            assert (refused.value.code, refused.value.param) == (
                "unsupported_input", "input_reference",
            )  # fmt: skip
        clip = ("a.mp4", io.BytesIO(b"0"), "video/mp4")
        for call in (
            lambda: c.videos.edit(prompt="x", video=clip),
            lambda: c.videos.extend(prompt="x", seconds="4", video=clip),
            lambda: c.videos.create_character(name="x", video=clip),
            lambda: c.videos.get_character("char_1"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                call()
            assert refused.value.code == "unsupported_input"


BOUNDARY = "multipart/form-data; boundary=b"
FORMS = [
    (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx', BOUNDARY),  # no end
    (b"no boundary here", BOUNDARY),
    (b"--b\r\n\r\nx\r\n--b--\r\n", BOUNDARY),  # no name
    (b"--b--\r\n", "multipart/form-data"),  # no boundary
    (b'--b\r\nContent-Disposition: form-data; name="prompt\r\n\r\nx\r\n--b--', BOUNDARY),
    (b"", BOUNDARY),
    (b"\xff\xfe" * 50, "application/json"),
    (b"{" * 5000, "application/json"),
    (b'{"prompt": NaN}', "application/json"),
    (b'{"prompt": "x", "prompt": "y"}', "application/json"),
    (b"", "application/json"),
    (b"%ff=%fe", "application/x-www-form-urlencoded"),
]


def test_malformed_bodies_are_a_400(tmp_path):
    with fake(tmp_path, max_body=2**16) as (address, server, _):
        for data, kind in FORMS:
            status, _, answer = ask(address, "/v1/videos", "POST", data, {"Content-Type": kind})
            assert status == 400 and answer["error"]["code"], (data[:60], answer)
        many = b"".join(
            b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i
            for i in range(500)
        )
        status, _, answer = ask(
            address, "/v1/videos", "POST", many + b"--b--\r\n", {"Content-Type": BOUNDARY}
        )
        assert (status, answer["error"]["code"]) == (400, "invalid_form")
        status, _, answer = ask(address, "/v1/videos", "POST", b"x", {"Content-Type": "text/plain"})
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
        status, _, answer = ask(address, "/v1/videos", "POST", {"prompt": "x" * 2**17})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        twice = b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n'
        answer = ask(
            address, "/v1/videos", "POST", twice * 2 + b"--b--\r\n", {"Content-Type": BOUNDARY}
        )[2]
        assert answer["error"]["param"] == "seed"
        assert sum(server.dispatcher.store.counts().values()) == 0
        assert ask(address, "/ready")[0] == 200


def test_ids_are_no_paths(tmp_path):
    with fake(tmp_path) as (address, _, _):
        (tmp_path / "store" / "secret.mp4").write_bytes(b"sesame")
        for odd in (
            "..", "%2e%2e", "..%2f..%2fsecret.mp4", "video_", "video_" + "0" * 31 + "g",
            "video_%00", "%2fetc%2fpasswd", "video_" + "0" * 32, "'; DROP TABLE jobs; --",
        ):  # fmt: skip
            odd = odd.replace(" ", "%20")
            for rest in ("", "/content", "/events"):
                status, _, answer = ask(address, f"/v1/videos/{odd}{rest}")
                assert status == 404 and b"sesame" not in json.dumps(answer).encode(), odd
        for variant in ("../jobs.sqlite", "Video", ""):
            made = ask(address, "/v1/videos", "POST", {"prompt": "x"})[2]
            status, _, answer = ask(address, f"/v1/videos/{made['id']}/content?variant={variant}")
            assert (status, answer["error"]["param"]) == (400, "variant")


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=101", "limit=x", "order=up", "after=video_x", "page=2"]
)
def test_lists_refuse_what_they_do_not_know(tmp_path, query):
    with fake(tmp_path) as (address, _, _):
        status, _, answer = ask(address, f"/v1/videos?{query}")
        assert status in (400, 404) and answer["error"]["param"] == query.partition("=")[0]


def test_other_routes_and_methods_are_answered_in_the_same_shape(tmp_path):
    with fake(tmp_path) as (address, _, _):
        assert ask(address, "/v1/nothing")[2]["error"]["code"] == "not_found"
        status, headers, answer = ask(address, "/v1/videos", "PUT", b"")
        assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
        assert headers["Allow"]


def test_content_in_ranges(tmp_path):
    with fake(tmp_path) as (address, _, _):
        done = client(address).videos.create_and_poll(prompt="x")
        path = f"/v1/videos/{done.id}/content"
        status, headers, body = ask(address, path, headers={"Range": "bytes=10-19"})
        assert (status, len(body)) == (206, 10) and headers["Content-Range"] == "bytes 10-19/1000"
        assert ask(address, path, headers={"Range": "bytes=5000-"})[0] == 416
        status, headers, body = ask(address, path, "HEAD")
        assert (status, headers["Content-Length"], body) == (200, "1000", b"")
        assert headers["Content-Disposition"] == f'attachment; filename="{done.id}.mp4"'
        assert headers["X-Content-Type-Options"] == "nosniff"


# --- jobs ---


def statuses(server, *ids):
    return [server.dispatcher.store.get(i).status for i in ids]


def test_cancel_takes_effect_within_a_step_and_the_next_job_begins(tmp_path):
    with fake(tmp_path, FakeRunner(steps=1000, seconds=0.02)) as (address, server, runner):
        c = client(address)
        first, second, third = (c.videos.create(prompt=f"clip {i}").id for i in range(3))
        wait_for(lambda: c.videos.retrieve(first).progress > 0)
        row = check_video(ask(address, f"/v1/videos/{second}/cancel", "POST")[2])
        assert row["error"]["code"] == "cancelled"  # one that waits
        began = time.monotonic()
        row = check_video(ask(address, f"/v1/videos/{first}/cancel", "POST")[2])
        assert row["status"] == "failed" and row["error"]["code"] == "cancelled"
        wait_for(lambda: "clip 2" in runner.begun)
        assert time.monotonic() - began < 0.5 and "clip 1" not in runner.begun
        again = ask(address, f"/v1/videos/{first}/cancel", "POST")
        assert again[0] == 200 and again[2] == row  # once more changes nothing
        assert c.videos.delete(third).deleted  # one that runs
        wait_for(lambda: not server.dispatcher.live)
        assert ask(address, f"/v1/videos/{third}")[0] == 404


def test_priorities_and_a_fair_order_of_keys(tmp_path):
    keys = ("first-key-12", "second-key-12")
    with fake(tmp_path, api_keys=keys) as (address, _, runner):
        runner.gate = asyncio.Event()
        one, two = (client(address, key) for key in keys)
        one.videos.create(prompt="running")
        wait_for(lambda: runner.begun)
        for i in range(4):
            one.videos.create(prompt=f"one {i}")
        for i in range(2):
            two.videos.create(prompt=f"two {i}")
        urgent = one.videos.create(prompt="urgent", extra_body={"priority": 5})
        last = one.videos.create(prompt="idle", extra_body={"priority": -5})
        runner.gate.set()
        runner.gate = None
        one.videos.poll(last.id)
        order = runner.begun[1:]
        assert order[0] == "urgent" and order[-1] == "idle" and urgent.id
        # the second key's two are not behind the first's four
        assert order.index("two 1") < order.index("one 2")
        assert [o for o in order if o.startswith("one")] == [f"one {i}" for i in range(4)]


def test_a_full_queue_is_a_429_with_the_time_to_wait(tmp_path):
    with fake(tmp_path, max_queue=2) as (address, _, runner):
        runner.gate = asyncio.Event()
        c = client(address)
        c.videos.create(prompt="running")
        wait_for(lambda: runner.begun)
        c.videos.create(prompt="a"), c.videos.create(prompt="b")
        with pytest.raises(openai.RateLimitError) as refused:
            c.videos.create(prompt="c")
        assert refused.value.code == "queue_full"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        runner.gate.set()


def test_the_quota_refuses_and_results_stay_until_they_expire(tmp_path):
    with fake(tmp_path, FakeRunner(size=60_000), quota=90_000, keep=1.0) as (address, server, _):
        c = client(address)
        first = c.videos.create_and_poll(prompt="a")
        with pytest.raises(openai.RateLimitError) as refused:
            c.videos.create(prompt="b")
        assert refused.value.code == "insufficient_quota"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert len(c.videos.download_content(first.id).read()) == 60_000
        wait_for(lambda: server.dispatcher.store.get(first.id) is None)
        assert ask(address, f"/v1/videos/{first.id}")[0] == 404
        wait_for(lambda: not list((tmp_path / "store" / "videos").iterdir()))
        assert c.videos.create_and_poll(prompt="b").status == "completed"


def test_deadlines_of_what_waits_and_of_what_runs(tmp_path):
    runner = FakeRunner(steps=10_000, seconds=0.01)
    with fake(tmp_path, runner, deadline=1.0) as (address, server, _):
        c = client(address)
        ids = [c.videos.create(prompt=f"clip {i}").id for i in range(2)]
        rows = [c.videos.poll(i) for i in ids]
        assert [r.error.code for r in rows] == ["deadline_exceeded"] * 2
        wait_for(lambda: not server.dispatcher.live)
        assert runner.begun == ["clip 0"]


def test_a_lost_worker_begins_the_job_again_and_gives_up_in_the_end(tmp_path):
    with fake(tmp_path) as (address, _server, runner):
        c = client(address)
        assert c.videos.create_and_poll(prompt="lose 2 workers").status == "completed"
        assert runner.begun == ["lose 2 workers"] * 3
        given_up = c.videos.create_and_poll(prompt="lose 9 workers")
        assert given_up.error.code == "worker_lost" and "3 times" in given_up.error.message
        assert c.videos.create_and_poll(prompt="fine").status == "completed"
        text = ask(address, "/metrics")[2].decode()
        assert "nexus_rt_workers_lost_total 5.0" in text


def test_compatible_jobs_are_one_batch_where_the_server_says_so(tmp_path):
    with fake(tmp_path, batch=3) as (address, _, runner):
        runner.gate = asyncio.Event()
        c = client(address)
        c.videos.create(prompt="running")
        wait_for(lambda: runner.begun)
        ids = [c.videos.create(prompt=f"clip {i}").id for i in range(2)]
        c.videos.create(prompt="other", size="80x64")
        ids += [c.videos.create(prompt=f"clip {i}").id for i in range(2, 4)]
        runner.gate.set()
        runner.gate = None
        assert all(c.videos.poll(i).status == "completed" for i in ids)
        wait_for(lambda: len(runner.calls) == 4)
        assert runner.calls[1:] == [("clip 0", "clip 1", "clip 2"), ("other",), ("clip 3",)]


def test_a_fault_of_ours_fails_one_job_and_not_the_queue(tmp_path):
    with fake(tmp_path) as (address, _, _):
        c = client(address)
        failed = c.videos.create_and_poll(prompt="crash")
        assert failed.error.code == "internal_error" and "secret" not in failed.error.message
        assert c.videos.create_and_poll(prompt="x").status == "completed"


def test_a_full_disk_fails_the_job_and_not_the_server(tmp_path, monkeypatch):
    with fake(tmp_path) as (address, server, _):
        c, of = client(address), server.dispatcher

        def full(*arguments):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(of, "_keep", full)
            failed = c.videos.create_and_poll(prompt="x")
            assert failed.error.code == "storage_full" and "No space" in failed.error.message
        with monkeypatch.context() as patch:

            def locked(*arguments, **named):
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(of.store, "add", locked)
            with pytest.raises(openai.InternalServerError) as refused:
                c.videos.create(prompt="x")
            assert refused.value.code == "storage_failed"
            assert "disk is full" not in str(refused.value)  # not our words
        assert c.videos.create_and_poll(prompt="x").status == "completed"


def test_a_restart_takes_up_what_was_left(tmp_path):
    runner = FakeRunner()
    with fake(tmp_path, runner) as (address, server, _):
        c = client(address)
        kept = c.videos.create_and_poll(prompt="kept").id
    runner = FakeRunner(steps=10_000, seconds=0.01)
    with fake(tmp_path, runner, grace=0.0) as (address, server, _):
        c = client(address)
        ids = [c.videos.create(prompt=f"clip {i}").id for i in range(3)]
        wait_for(lambda: runner.begun)
    (tmp_path / "store" / "videos" / "video_of_nobody").mkdir()
    with fake(tmp_path) as (address, server, runner):
        c = client(address)
        assert c.videos.retrieve(kept).status == "completed"
        assert len(c.videos.download_content(kept).read()) == 1000
        assert [c.videos.poll(i).status for i in ids] == ["completed"] * 3
        assert runner.begun == [f"clip {i}" for i in range(3)]  # in their order
        assert server.dispatcher.store.get(ids[0]).losses == 0  # stopped, not lost
        assert not (tmp_path / "store" / "videos" / "video_of_nobody").exists()


# --- watching ---


def test_events_from_the_queue_to_the_end(tmp_path):
    with fake(tmp_path, FakeRunner(seconds=0.02)) as (address, _, runner):
        runner.gate = asyncio.Event()
        c = client(address)
        first = c.videos.create(prompt="a")
        wait_for(lambda: runner.begun)
        second = c.videos.create(prompt="b")
        stream = messages(address, f"/v1/videos/{second.id}/events")
        kind, state = next(stream)
        assert kind == "state" and state["jobs_ahead"] == 0 and state["status"] == "queued"
        check_video({k: v for k, v in state.items() if k != "jobs_ahead"})
        runner.gate.set()
        events = list(stream)
        steps = [e for k, e in events if k == "step"]
        assert events[-1][0] == "completed" and events[-1][1]["progress"] == 100
        assert steps[-1]["steps"] == 10 and steps[-1]["phase"] == "large"
        assert steps[0]["phase"] == "small"
        progress = [e["progress"] for e in steps]
        assert progress == sorted(progress) and len(set(progress)) > 5
        assert all(set(e) >= {"step", "steps", "phase", "ms_left"} for e in steps)
        late = list(messages(address, f"/v1/videos/{first.id}/events"))
        assert [k for k, _ in late] == ["completed"]
        check_video(late[0][1])


def test_time_left_is_from_what_ran_before(tmp_path):
    with fake(tmp_path, FakeRunner(seconds=0.01)) as (address, _server, _):
        c = client(address)
        assert ask(address, "/v1/plan")[2]["total_ms"] is None  # nothing has run
        c.videos.create_and_poll(prompt="a")
        plan = ask(address, "/v1/plan")[2]
        assert plan["total_ms"] == pytest.approx(13.0)  # 10 steps and 3 stages of 1 ms
        second = c.videos.create(prompt="b")
        steps = [e for k, e in messages(address, f"/v1/videos/{second.id}/events") if k == "step"]
        assert steps[-1]["ms_left"] == pytest.approx(2.0)


def test_a_cancelled_and_a_deleted_job_end_their_streams(tmp_path):
    with fake(tmp_path, FakeRunner(steps=10_000, seconds=0.01)) as (address, server, _):
        c = client(address)
        for end, kind in (("cancel", "failed"), ("delete", "deleted")):
            job = c.videos.create(prompt="x").id
            with ThreadPoolExecutor(1) as pool:
                read = pool.submit(lambda j=job: list(messages(address, f"/v1/videos/{j}/events")))
                wait_for(lambda: server.dispatcher.hub.count)
                if end == "cancel":
                    ask(address, f"/v1/videos/{job}/cancel", "POST")
                else:
                    c.videos.delete(job)
                assert read.result(10)[-1][0] == kind
        wait_for(lambda: server.dispatcher.hub.count == 0)
        assert server.dispatcher.hub.latest == {}


def test_the_plan_of_a_request_with_its_steps(tmp_path):
    with fake(tmp_path) as (address, _, _):
        plan = ask(address, "/v1/plan?plan=handoff%3D0.5&num_inference_steps=8&size=80x64")[2]
        phases = [s["phase"] for s in plan["steps"]]
        assert len(phases) == 8 and phases[0] == "small" and phases[-1] == "large"
        assert "bridge" in phases and plan["size"] == "80x64"
        assert all(s["forwards"] for s in plan["steps"])
        assert plan["defaults"]["size"] == "64x64" and plan["loras"] == []
        status, _, answer = ask(address, "/v1/plan?plan=fast")
        assert (status, answer["error"]["param"]) == (400, "plan")


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
    for settings in (
        {"host": "0.0.0.0"},
        {"host": "example.com"},
        {"api_keys": ("short",)},
        {"api_keys": ("has a space in it",)},
        {"max_queue": 0},
        {"deadline": float("nan")},
        {"quota": "lots"},
        {"models": ("a b",)},
        {"models": ()},
        {"lora_folder": tmp_path / "absent"},
        {"port": 70_000},
        {"fps": "fast"},
    ):
        with pytest.raises(InputError):
            NexusServer(FakeRunner(), tmp_path / "store", **settings)
    server = NexusServer(
        FakeRunner(), tmp_path / "store", host="0.0.0.0", api_keys=("a-long-key-1",)
    )
    assert "a-long-key" not in repr(server.settings)
    with pytest.raises(InputError, match="was not started"):
        _ = server.dispatcher


def test_a_store_is_one_servers(tmp_path):
    with fake(tmp_path):
        second = NexusServer(FakeRunner(), tmp_path / "store")
        with pytest.raises(InputError, match="another server works on"):
            asyncio.run(second.start())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "jobs.sqlite").write_bytes(b"no database" * 1000)
    broken = NexusServer(FakeRunner(), tmp_path / "damaged")
    with pytest.raises(Exception, match="cannot be read as a job store"):
        asyncio.run(broken.start())


def test_a_silent_connection_and_a_slow_body_hold_nothing(tmp_path, monkeypatch):
    from nexus_rt.serve import bodies

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
    from nexus_rt.size import BuiltSizes, ClipSize

    built = (BuiltSizes("small", (ClipSize(64, 64, 17),)),)
    profile = mini_profile(built_sizes=built, loras=False, generators=("small",))
    (tmp_path / "ink.safetensors").write_bytes(b"")
    with fake(tmp_path, FakeRunner(profile=profile), lora_folder=tmp_path, plan="small") as made:
        address = made[0]
        post = lambda body: ask(address, "/v1/videos", "POST", {"prompt": "x", **body})
        assert post({})[0] == 200
        status, _, answer = post({"size": "80x64"})
        assert status == 400 and answer["error"]["param"] == "size"
        assert "64x64x17" in answer["error"]["message"]
        assert post({"plan": "large"})[2]["error"]["param"] == "plan"
        assert post({"lora": "ink"})[2]["error"]["param"] == "lora"
