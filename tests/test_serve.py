"""What clients send and what they are answered, by the official client and without."""

import asyncio
import io
import json
import time

import openai
import pytest
from openai.types import Model, VideoDeleteResponse

from nexus_rt.core.errors import ModelError
from tests.serving import (
    PROMPT,
    FakeRunner,
    ask,
    check_video,
    client,
    fake,
    wait_for,
)

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


def test_a_server_that_has_just_started_need_not_be_asked_again(tmp_path, monkeypatch):
    runner = FakeRunner()
    start, begun = runner.start, time.monotonic()

    async def slowly():
        await asyncio.sleep(0.5)
        return await start()

    runner.start = slowly
    with fake(tmp_path, runner, ready=False) as (address, _, _):
        assert ask(address, "/ready")[0] == 503
        assert ask(address, "/v1/videos", "POST", {"prompt": "x"})[0] == 200
        assert time.monotonic() - begun > 0.5 and ask(address, "/ready")[0] == 200
    monkeypatch.setattr("nexus_rt.serve.dispatcher.HELD", 0.1)
    runner.start = lambda: asyncio.sleep(3600)
    with fake(tmp_path, runner, ready=False) as (address, _, _):
        status, headers, body = ask(address, "/v1/videos", "POST", {"prompt": "x"})
        assert (status, body["error"]["code"]) == (503, "not_ready") and headers["Retry-After"]
        assert "being loaded" in body["error"]["message"]


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
    ({"prompt": "x", "num_inference_steps": 1001}, "num_inference_steps", "invalid_value"),
    ({"prompt": "x", "plan": "small:99999/100000 large:4"}, "plan", "invalid_value"),
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
