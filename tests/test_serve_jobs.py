"""The queue, what runs, and who watches it."""

import asyncio
import contextlib
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from nexus_rt.serve import profile
from tests.serving import (
    FakeRunner,
    ask,
    check_video,
    client,
    fake,
    messages,
    wait_for,
)


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


def test_models_that_are_gone_cost_no_job_and_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_rt.serve.dispatcher.PATIENCE", (0.05, 0.1))
    with fake(tmp_path) as (address, server, runner):
        done = client(address).videos.create_and_poll(prompt="unload the models")
        assert done.status == "completed" and runner.begun == ["unload the models"] * 2
        assert server.dispatcher.store.get(done.id).losses == 0


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
            patch.setattr("nexus_rt.serve.records.write_clip", full)
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


def test_an_end_that_cannot_be_written_down_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_rt.serve.dispatcher.PATIENCE", (0.01, 0.1))
    with fake(tmp_path) as (address, server, runner):
        store = server.dispatcher.store
        complete, asked = store.complete, []

        def full(*arguments):
            asked.append(arguments)
            if len(asked) < 3:
                raise sqlite3.OperationalError("database or disk is full")
            return complete(*arguments)

        monkeypatch.setattr(store, "complete", full)
        done = client(address).videos.create_and_poll(prompt="x")
        assert done.status == "completed" and len(asked) == len(runner.begun) == 3
        assert len(client(address).videos.download_content(done.id).read()) == 1000


def test_requests_of_another_version_fail_alone(tmp_path):
    with fake(tmp_path) as (address, _, runner):
        runner.gate = asyncio.Event()
        c = client(address)
        c.videos.create(prompt="running")
        wait_for(lambda: runner.begun)
        old, fine = c.videos.create(prompt="old"), c.videos.create(prompt="fine")
        rows = {"prompt": "old", "model": "m", "width": 64, "height": 64, "seconds": "1"}
        with contextlib.closing(sqlite3.connect(tmp_path / "store" / "jobs.sqlite")) as db, db:
            db.execute("UPDATE jobs SET request = ? WHERE id = ?", (json.dumps(rows), old.id))
        runner.gate.set()
        assert c.videos.poll(old.id).error.code == "invalid_value"
        assert c.videos.poll(fine.id).status == "completed"


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
    videos = tmp_path / "store" / "videos"
    left = [videos / f"video_{0:032x}", videos / f"video_{1:032x}.part"]  # of jobs that are gone
    others = [videos / "holiday", videos / "video_of_us.mp4"]  # a folder that is not ours alone
    for folder in (*left, *others):
        folder.mkdir()
    (tmp_path / "store").chmod(0o750)
    with fake(tmp_path) as (address, server, runner):
        c = client(address)
        assert c.videos.retrieve(kept).status == "completed"
        assert len(c.videos.download_content(kept).read()) == 1000
        assert [c.videos.poll(i).status for i in ids] == ["completed"] * 3
        assert runner.begun == [f"clip {i}" for i in range(3)]  # in their order
        assert server.dispatcher.store.get(ids[0]).losses == 0  # stopped, not lost
        assert not any(p.exists() for p in left) and all(p.exists() for p in others)
        assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750


# --- planning ---


@pytest.fixture
def plans(monkeypatch):
    """The settings of every plan that a server makes."""
    made, make = [], profile.make_request

    def counted(settings, *arguments):
        made.append(settings.num_inference_steps)
        return make(settings, *arguments)

    monkeypatch.setattr(profile, "make_request", counted)
    return made


def test_a_job_is_planned_once_whatever_becomes_of_it(tmp_path, plans):
    with fake(tmp_path) as (address, server, runner):
        c, given, run = client(address), {}, runner.run

        async def record(tasks, emit):
            given.update({t.request.prompt: t.planned for t in tasks})
            return await run(tasks, emit)

        runner.run, runner.gate = record, asyncio.Event()
        create = lambda prompt, steps: c.videos.create(
            prompt=prompt, extra_body={"num_inference_steps": steps, "plan": "large"}
        )
        first = create("lose 2", 1).id  # three attempts
        wait_for(lambda: runner.begun)
        jobs = [create(prompt, i).id for i, prompt in enumerate(("a", "fail x", "b", "c"), 2)]
        ask(address, f"/v1/videos/{jobs[2]}/cancel", "POST")
        c.videos.delete(jobs[3])
        assert set(server.dispatcher.planned) == {first, jobs[0], jobs[1]}
        runner.gate.set()
        ended = [c.videos.poll(job).status for job in (first, jobs[0], jobs[1])]
        assert ended == ["completed", "completed", "failed"] and len(runner.begun) == 5
        assert plans == [1, 2, 3, 4, 5]
        assert {p: len(planned.plan) for p, planned in given.items()} == {
            "lose 2": 1, "a": 2, "fail x": 3,
        }  # fmt: skip
        assert not server.dispatcher.planned


def test_jobs_of_before_a_restart_are_planned_when_they_run(tmp_path, plans):
    runner = FakeRunner(steps=10_000, seconds=0.01)
    with fake(tmp_path, runner, grace=0.0) as (address, _, _):
        c = client(address)
        ids = [
            c.videos.create(prompt="x", extra_body={"num_inference_steps": i}).id for i in (5, 6)
        ]
        wait_for(lambda: runner.begun)
    assert plans == [5, 6]
    with fake(tmp_path) as (address, server, _):
        assert [client(address).videos.poll(i).status for i in ids] == ["completed"] * 2
        assert plans == [5, 6, 5, 6] and not server.dispatcher.planned


def test_plans_of_more_waiting_jobs_than_are_kept_are_made_again(tmp_path, plans, monkeypatch):
    monkeypatch.setattr("nexus_rt.serve.records.MAX_PLANNED", 2)
    with fake(tmp_path) as (address, server, runner):
        c, runner.gate = client(address), asyncio.Event()
        ids = [
            c.videos.create(prompt="x", extra_body={"num_inference_steps": i}).id for i in (5, 6, 7)
        ]
        assert list(server.dispatcher.planned) == ids[:2]
        runner.gate.set()
        assert [c.videos.poll(i).status for i in ids] == ["completed"] * 3
        assert plans == [5, 6, 7, 7]


# --- watching ---


def test_a_long_plan_is_told_step_by_step_and_holds_nothing_up(tmp_path):
    with fake(tmp_path, FakeRunner(steps=1000)) as (address, _, _):
        c = client(address)
        c.videos.create_and_poll(prompt="a", extra_body={"num_inference_steps": 1000})
        began = time.monotonic()
        job = c.videos.create(prompt="b", extra_body={"num_inference_steps": 1000})
        seconds = []
        while c.videos.retrieve(job.id).status != "completed":
            asked = time.monotonic()
            ask(address, "/health")
            seconds.append(time.monotonic() - asked)
        assert time.monotonic() - began < 10.0 and max(seconds, default=0.0) < 1.0
        plan = ask(address, "/v1/plan?num_inference_steps=1000")[2]
        assert len(plan["steps"]) == 1000 and plan["total_ms"] > 0


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
        assert events[-1][0] == check_video(events[-1][1])["status"] == "completed"
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
                last = read.result(10)[-1]
                assert last[0] == kind
                if kind == "failed":
                    assert check_video(last[1])["error"]["code"] == "cancelled"
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
