import asyncio
import math
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from nexus_rt.core.errors import InputError
from nexus_rt.core.size import ClipSize
from nexus_rt.media.reading import read_frames, read_metadata
from nexus_rt.media.video import save_video
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.pipeline import pipeline
from nexus_rt.pipeline.inputs import Prompts
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.serve import generate, profile
from nexus_rt.serve.events import EventBroker, sse
from nexus_rt.serve.generate import ServedPipeline
from nexus_rt.serve.job import NewJob
from nexus_rt.serve.preview import LatentRGB, clean, fit, picture, shipped
from nexus_rt.serve.prices import Prices, step_kinds, units
from nexus_rt.serve.problems import JobFailed
from nexus_rt.serve.store import NoRoom, QueueFull, Store
from tests.more import cases
from tests.refusals import refuses
from tests.serving import PROMPT, clip_request, planned, task


def put(store, owner="", now=0.0, deadline=math.inf, **values):
    job = NewJob(owner, {"prompt": "x"}, now, min(deadline, 1e12), **values)
    return store.add(job, 10**6, 10**15)


# --- the store ---


def test_a_job_ends_once_and_only_by_its_current_attempt(tmp_path):
    store = Store(tmp_path)
    job = put(store)
    (first,) = store.claim(1.0)
    assert (first.id, first.status, first.attempts) == (job.id, "in_progress", 1)
    assert store.requeue(first, lost=True)
    (second,) = store.claim(2.0)
    assert (second.attempts, second.losses) == (2, 1)
    assert not store.complete(first, 3.0, 9.0, 5, {})  # the lost attempt comes back
    assert not store.fail(job.id, 3.0, 9.0, "x", "y", attempt=1)
    assert store.complete(second, 3.0, 9.0, 5, {"meta": {}})
    assert not store.complete(second, 4.0, 9.0, 5, {})
    assert not store.fail(job.id, 4.0, 9.0, "cancelled", "late")
    ended = store.get(job.id)
    assert (ended.status, ended.completed_at, ended.bytes) == ("completed", 3.0, 5)
    assert store.perf(job.id) == {"meta": {}}


def test_bounds_of_queue_and_quota(tmp_path):
    store = Store(tmp_path)
    new = lambda room: NewJob("", {}, 0.0, 1e12, room=room)
    store.add(new(60), 2, 100)
    with pytest.raises(NoRoom):
        store.add(new(50), 2, 100)
    store.add(new(40), 2, 100)
    with pytest.raises(QueueFull):
        store.add(new(0), 2, 100)
    (job, *_) = store.claim(1.0)
    store.complete(job, 2.0, 50.0, 80, {})
    with pytest.raises(NoRoom):  # what is stored counts as it is
        store.add(new(0), 2, 100)
    assert store.used() == 80 and store.next_expiry() == 50.0
    assert [j.id for j in store.expired(50.0)] == [job.id] and not store.expired(49.0)
    assert store.delete(job.id) and not store.delete(job.id) and store.used() == 0


def test_what_is_due_is_neither_claimed_nor_lost(tmp_path):
    store = Store(tmp_path)
    late, job = put(store, deadline=5.0), put(store)
    assert [j.id for j in store.claim(5.0)] == [job.id]
    assert [j.id for j in store.overdue(5.0)] == [late.id]
    store.fail(job.id, 6.0, 9.0, "x", "y")
    assert [j.id for j in store.overdue(1e13)] == [late.id]


def test_after_a_kill_everything_is_there_and_waits_again(tmp_path):
    store = Store(tmp_path / "served")
    jobs = [put(store, cost=i + 1.0) for i in range(3)]
    store.claim(1.0)
    # what is on the disk while nothing is closed; another folder, for the lock goes with a process
    shutil.copytree(tmp_path / "served", tmp_path / "left")
    again = Store(tmp_path / "left")
    (held,) = again.recover()
    assert (held.id, held.status, held.losses) == (jobs[0].id, "queued", 1)
    assert [again.claim(2.0)[0].id for _ in range(3)] == [j.id for j in jobs]


def test_batches_take_what_waits_of_the_same_kind(tmp_path):
    store = Store(tmp_path)
    jobs = [put(store, batch_key=k) for k in "abaab"]
    ids = [j.id for j in jobs]
    taken = lambda: [ids.index(j.id) for j in store.claim(1.0, 2)]
    assert [taken() for _ in range(4)] == [[0, 2], [1, 4], [3], []]


@cases(
    8,
    60,
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.5, 8.0)), min_size=6, max_size=40),
)
def test_waiting_keys_get_equal_work_whatever_one_piles_up(rows):
    """While two keys wait, the work done for them differs by at most a job of each (Goyal et al.,
    theorem 1); within a key the order is that of arrival."""
    with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder))) as store:
        assert_fair(store, rows)


def assert_fair(store, rows):
    """What is claimed of these jobs, in turn, is fair."""
    queued = {owner: [] for owner in "abc"}
    for owner, cost in rows:
        queued[owner].append((put(store, owner, cost=cost).id, cost))
    most, done = max(cost for _, cost in rows), dict.fromkeys("abc", 0.0)
    while jobs := store.claim(1.0):
        waiting = [o for o in "abc" if queued[o]]
        owner = jobs[0].owner
        job_id, cost = queued[owner].pop(0)
        assert job_id == jobs[0].id
        done[owner] += cost
        for a in waiting:
            for b in waiting:
                if queued[a] and queued[b]:
                    assert abs(done[a] - done[b]) <= 2 * most + 1e-9
        store.fail(job_id, 2.0, 9.0, "x", "y")
    assert not any(queued.values())


def test_a_key_that_was_idle_saves_up_nothing(tmp_path):
    store = Store(tmp_path)
    for _ in range(5):
        put(store, "busy")
        store.claim(1.0)
    for _ in range(3):
        put(store, "busy")
        put(store, "late")
    order = [store.claim(2.0)[0].owner for _ in range(6)]
    assert sorted(order[:2]) == ["busy", "late"] and sorted(order[2:4]) == ["busy", "late"]


def test_ten_thousand_waiting_jobs_are_claimed_quickly(tmp_path):
    store = Store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db, db:
        db.executemany(
            "INSERT INTO jobs (id, owner, status, priority, cost, room, created_at, deadline_at,"
            " batch_key, request) VALUES (?, ?, 'queued', 0, 1, 1, 0, 1e12, '', '{}')",
            [(f"video_{i:032x}", f"key {i % 20}") for i in range(10_000)],
        )
    began = time.perf_counter()
    for _ in range(20):
        assert len(store.claim(1.0)) == 1
    put(store, "key 3")
    assert time.perf_counter() - began < 2.0


# --- events ---


def test_a_watcher_that_does_not_read_costs_the_newest_of_each_kind():
    async def run():
        hub, got = EventBroker(), []
        stream = hub.watch("a", ("state", {"n": -1}))
        assert (await anext(stream))[0] == "state"
        for i in range(10_000):
            hub.publish("a", "step", {"step": i})
            hub.publish("a", "preview", {"step": i})
        (watcher,) = hub.watchers["a"]
        assert len(watcher.waiting) == 2
        hub.publish("a", "completed", {"n": 1})
        async for message in stream:
            got.append(message)
        assert hub.count == 0 and hub.latest == {}
        return got

    got = asyncio.run(run())
    assert got == [
        ("step", {"step": 9999}), ("preview", {"step": 9999}), ("completed", {"n": 1}),
    ]  # fmt: skip


def test_messages_are_one_line_of_json_whatever_they_hold():
    text = sse(("rewriting", {"text": "a\nb\r\n\nevent: completed\ndata: {}\n\n"})).decode()
    assert text.count("\n\n") == 1 and text.endswith("\n\n")
    assert text.splitlines()[0] == "event: rewriting" and len(text.splitlines()) == 3
    assert sse(None).startswith(b":")


# --- prices ---


def test_prices_of_what_ran_of_another_size_and_of_another_kind():
    request, prices = planned(plan="handoff=0.5"), Prices()
    assert prices.total(request) is None
    cells = math.prod(request.size.latent)
    prices.observe("small:2", cells, 10.0)
    prices.observe("large:1", cells, 30.0)
    for stage in ("encode", "decode", "write"):
        prices.observe(stage, cells, 5.0)
    kinds = step_kinds(request)
    expected = {"small:2": 10.0, "large:1": 30.0, "small:2 large:1": 2 * 5.0 + 30.0}
    assert set(kinds) == set(expected)
    assert prices.steps(request) == pytest.approx([expected[k] for k in kinds])
    whole = sum(expected[k] for k in kinds) + 15.0
    assert prices.total(request) == pytest.approx(whole)
    left = prices.left(request)
    assert left[0] == whole and left[-1] == pytest.approx(10.0) and len(left) == len(kinds) + 1
    assert left[1:] == pytest.approx(
        [10.0 + sum(expected[k] for k in kinds[i:]) for i in range(1, len(kinds) + 1)]
    )
    wide = planned(plan="handoff=0.5", width=128)
    assert prices.total(wide) == pytest.approx(2 * whole)
    assert Prices(prices.as_row()).total(request) == pytest.approx(whole)
    prices.observe("small:2", cells, float("nan"))
    assert prices.ms("small:2", cells) == 10.0
    assert units(wide) == 2 * units(request) > 0


# --- previews ---


def test_the_fit_is_the_linear_map_that_made_the_frames():
    rng = np.random.default_rng(0)
    factors, bias = rng.normal(size=(16, 3)) / 20, np.array([0.1, -0.1, 0.0])
    latents = torch.randn(2, 16, 3, 6, 8, dtype=torch.float64)
    cells = np.einsum("bcthw,cr->bthwr", latents.numpy(), factors) + bias
    frames = np.repeat(np.repeat(cells, 8, axis=2), 8, axis=3)
    frames = np.concatenate([frames[:, :1], np.repeat(frames[:, 1:], 4, axis=1)], axis=1)
    made = fit(latents, (frames + 1) / 2)
    assert np.allclose(made.factors, factors, atol=2e-3) and np.allclose(made.bias, bias, atol=2e-3)
    expected = ((cells[0, 1] + 1) * 127.5).clip(0, 255)
    assert np.abs(made.frames(latents)[0].numpy().astype(float) - expected).max() <= 2.0
    with refuses("mismatch", "frames", InputError):
        fit(latents, frames[:, :5])


def test_a_straight_path_points_at_its_clean_end():
    x0, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    at = lambda s: (1 - s) * x0 + s * noise
    for sigma, following in ((1.0, 0.9), (0.7, 0.2), (0.3, 0.0)):
        made = clean(at(sigma), at(following), sigma, following)
        assert torch.allclose(made, x0, atol=1e-5)


def test_the_shipped_maps_know_their_spaces():
    from nexus_rt.models.wan_vae import WAN_VAE

    pipe = NexusPipeline.from_pretrained()
    mini, wan = shipped(pipe.vae.space), shipped(WAN_VAE)
    assert mini is not None and wan is not None and mini != wan
    assert len(wan.factors) == 16 and wan.bias == (-0.1835, -0.0868, -0.3360)
    assert shipped({**WAN_VAE, "latents_mean": [0.0] * 16}) is None
    grey = LatentRGB(((0.0,) * 3,) * 16, (0.0,) * 3)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="latent").frames
    pixels = pipe.decode(latents)[0][5:9].mean(axis=0).reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    error = lambda rgb: float(np.abs(rgb.frames(latents)[0].numpy() / 255 - pixels).mean())
    assert error(mini) < 0.12 < 3 * error(mini) < error(grey)
    assert picture(mini.frames(latents)[0].numpy()).startswith(b"\xff\xd8")
    broken = latents[0] * float("nan")
    assert mini.frames(broken[None])[0].shape == (8, 8, 3)


# --- a worker's jobs ---


@pytest.fixture(scope="module")
def served():
    pipe = NexusPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return ServedPipeline(pipe)


def test_a_job_is_what_the_pipeline_makes_with_its_seed(served, tmp_path):
    events = []
    job = task(plan="small:4 large:*", num_inference_steps=8, negative_prompt="blur")
    (clip,) = served.run([job], events.append)
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip.video)
    made = served.pipe(
        PROMPT, "blur", plan="small:4 large:*", num_inference_steps=8,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    frames = read_frames(path)
    assert frames.shape == (17, 64, 64, 3)
    assert np.abs(frames / 255 - made.frames[0]).mean() < 0.02  # what H.264 loses
    known = read_metadata(path)
    assert (known["prompt"], known["seed"], known["plan"]) == (PROMPT, 5, made.plan.name)
    kinds = [e["kind"] for e in events]
    assert kinds.count("step") == 8 and kinds.count("preview") == 8
    assert [e["stage"] for e in events if e["kind"] == "stage"] == ["encode", "decode", "write"]
    assert [e["text"] for e in events if e["kind"] == "rewriting"]
    assert [r["step"] for r in clip.perf["denoise_steps_ms"]] == list(range(8))
    assert sum(r["duration_ms"] for r in clip.perf["steps"]) <= clip.perf["total_duration_ms"]
    assert clip.perf["meta"]["seed"] == 5 and "prompt" not in clip.perf["meta"]


@pytest.mark.parametrize(
    "settings",
    [
        {"plan": "auto=0.1", "num_inference_steps": 6, "energy": "progressive", "gamma_w": 0.5},
        {"plan": "large", "timesteps": [999, 750, 500], "guidance_scale_2": 2.0},
        {"plan": "handoff=0.5", "small_steps": 4, "large_steps": 3, "solver": "euler", "shift": 4},
        {
            "plan": "handoff=0.5",
            "num_inference_steps": 4,
            "blend": {"split": "dct", "rho_max": 0.5},
        },
        {"plan": "small:2 renoise=0.75 large:4", "rewrite": "a red disk"},  # draws noise again
        {"as_published": True, "num_inference_steps": 3},
    ],
)
def test_every_setting_makes_what_a_call_makes(served, tmp_path, settings):
    """To the pixel, whose rounding `as_published` sets."""
    (clip,) = served.run([task(**settings)], lambda event: None)
    (tmp_path / "clip.mp4").write_bytes(clip.video)
    call = (
        {**settings, "blend": BlendConfig(**settings["blend"])} if "blend" in settings else settings
    )
    made = served.pipe(PROMPT, generator=torch.Generator().manual_seed(5), **call)
    cut = settings.get("as_published", False)
    expected = {
        truncate: read_frames(save_video(made.frames[0], tmp_path / "own.mp4", truncate=truncate))
        for truncate in (False, True)
    }
    frames = read_frames(tmp_path / "clip.mp4")
    assert np.array_equal(frames, expected[cut]) and not np.array_equal(frames, expected[not cut])
    options = read_metadata(tmp_path / "clip.mp4")["options"]
    assert set(options) == {"width", "height", "num_frames", *settings} - {"plan", "rewrite"}
    row, meta = clip_request(**settings).call, clip.perf["meta"]
    assert meta == {**meta, **row, "plan": made.plan.name}


def test_a_prompt_longer_than_what_is_read_is_said_to_its_client(served):
    events = []
    long = PROMPT + " and stays" * 300
    with pytest.warns(UserWarning, match="tokens and 512 are read"):
        (clip,) = served.run([task(prompt=long, plan="large", rewrite="off")], events.append)
    (warning,) = [e["message"] for e in events if e["kind"] == "warning"]
    assert "512 are read" in warning and clip.perf["meta"]["warnings"] == [warning]


def test_a_worker_plans_nothing_itself(served, monkeypatch):
    """The task holds what its request generates; prompts are checked once, for the batch."""
    tasks = [task(str(i), plan="small", num_inference_steps=2) for i in range(2)]
    checked, of = [], Prompts.of
    for module in (pipeline, profile):
        for name in ("make_request", "check_request"):
            monkeypatch.setattr(module, name, None)  # a call would be a failure
    monkeypatch.setattr(
        Prompts, "of", lambda *arguments: checked.append(arguments) or of(*arguments)
    )
    assert [clip.id for clip in served.run(tasks, lambda event: None)] == ["0", "1"]
    assert len(checked) == 1


def test_previews_come_every_k_steps_and_look_like_the_clip(served):
    events = []
    served.preview_every = 3
    try:
        served.run([task()], events.append)
    finally:
        served.preview_every = 1
    previews = [e for e in events if e["kind"] == "preview"]
    assert [e["step"] for e in previews] == [3, 6, 9, 10]
    assert all(e["image"].startswith("data:image/jpeg;base64,") for e in previews)


def test_nothing_wanted_stops_within_a_step(served):
    events = []

    def emit(event):
        events.append(event)
        if sum(e["kind"] == "step" for e in events) == 3:
            served.cancel("a")

    with pytest.raises(JobFailed) as stopped:
        served.run([task()], emit)
    assert stopped.value.code == "cancelled"
    assert sum(e["kind"] == "step" for e in events) == 3


def test_a_batch_is_each_by_itself_and_loses_what_is_not_wanted(served, monkeypatch):
    decoded, decode = [], generate.decode

    def record(components, request, latents):
        decoded.append(len(latents))
        return decode(components, request, latents)

    monkeypatch.setattr(generate, "decode", record)
    tasks = [task(str(i), seed=i) for i in range(3)]
    served.cancel("1")  # before it begins
    clips = served.run(tasks, lambda event: None)
    assert [c.id for c in clips] == ["0", "2"] and decoded == [2]
    assert clips[0].perf["meta"]["batch"] == 3 and clips[1].perf["meta"]["seed"] == 2


def test_loras_are_merged_for_a_job_and_taken_out_again(served, tmp_path):
    from nexus_rt.loading.lora import PACKAGED

    path = PACKAGED / "few_step.safetensors"
    run = lambda loras: (
        served.run([task("a", loras, loras=("x",) if loras else ())], lambda e: None)[0].spritesheet
    )
    plain = run({})
    merged = run({"large": (f"{path}@1",)})
    assert [lora.path.name for lora in served.pipe.loras["large"]] == ["few_step.safetensors"]
    assert merged != plain and run({}) == plain
    assert served.pipe.loras["large"] == ()
    with pytest.raises(JobFailed) as failed:
        run({"large": (f"{tmp_path}/gone.safetensors@1",)})
    assert failed.value.code == "generation_failed"


def test_failures_have_codes(served, monkeypatch):
    from nexus_rt.core.errors import NumericsError

    for error, code in (
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (NumericsError("velocity is not finite"), "not_finite"),
        (RuntimeError("/srv/secret/path"), "generation_failed"),
    ):

        def fails(*arguments, error=error, **named):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(generate, "encode", fails)
            with pytest.raises(JobFailed) as failed:
                served.run([task()], lambda e: None)
        assert failed.value.code == code and "secret" not in failed.value.message


def test_previews_never_wait_for_a_device(served, monkeypatch):
    """By a device that has a frame two steps after it was asked."""
    asked, waited = [], []

    class Slow:
        def __init__(self, tensor):
            self.frames, self.number = tensor, len(asked)
            asked.append(self)

        @property
        def ready(self):
            return len(asked) > self.number + 2

        def tensor(self):
            if not self.ready:
                waited.append(self.number)
            return self.frames

    monkeypatch.setattr(generate, "fetch", Slow)
    events = []
    served.run([task()], events.append)
    assert waited == [8, 9]  # after the last step alone
    told = [(e["kind"], e["step"]) for e in events if e["kind"] in ("step", "preview")]
    assert [s for k, s in told if k == "preview"] == list(range(1, 11))
    assert told.index(("preview", 1)) == told.index(("step", 3)) + 1


def test_engines_that_move_are_counted():
    pipe = NexusPipeline.from_pretrained(vram="30MB")
    pipe.set_progress_bar_config(disable=True)
    moving = ServedPipeline(pipe, preview_every=0)
    plan = pipe.make_plan("small:1 large:*", 2)
    phases = {
        p.name for p in pipe.plan_residency(plan, ClipSize(64, 64, 17)).phases if p.first >= 0
    }
    (clip,) = moving.run([task(plan="small:1 large:*", num_inference_steps=2)], lambda event: None)
    assert clip.perf["meta"]["residency_moves"] == len(phases) > 1
