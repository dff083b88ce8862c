"""What the disk, the memory and other versions do to a server."""

import asyncio
import errno
import hashlib
import os
import shutil
import signal
import sqlite3
import sys
from contextlib import closing

import numpy as np
import openai
import pytest
import torch

from nexus_rt.core.errors import DecodeError, InputError, ModelError, NexusError
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.serve import clips, database, exhaustion
from nexus_rt.serve.clips import FILES, write_clip
from nexus_rt.serve.exhaustion import exhausted, killed_for_memory
from nexus_rt.serve.generate import Clip
from nexus_rt.serve.job import NewJob
from nexus_rt.serve.problems import JobFailed, WorkerLost
from nexus_rt.serve.runners import ProcessRunner
from nexus_rt.serve.store import Store
from tests.refusals import refuses
from tests.serving import (
    FakeRunner,
    ask,
    client,
    clip_request,
    fake,
    task,
    wait_for,
    workers,
)


def put(store, owner="", **values):
    return store.add(NewJob(owner, clip_request().as_row(), 0.0, 1e12, **values), 10**6, 10**15)


# --- a store that cannot be written ---


def digest_of(folder):
    return {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*.sqlite")}


@pytest.mark.parametrize(
    "broken",
    [
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("attempt to write a readonly database"),
        sqlite3.OperationalError("unable to open database file"),
        sqlite3.OperationalError("disk I/O error"),
        sqlite3.OperationalError("database is locked"),
        None,  # sqlite's own words for a file that it may only read
    ],
)
def test_a_full_or_read_only_store_is_whole_and_nobody_is_told_to_move_it(
    tmp_path, monkeypatch, broken
):
    with closing(Store(tmp_path)) as store:
        job = put(store)
    before, connect = digest_of(tmp_path), sqlite3.connect

    def fails(path, **named):
        if broken is not None:
            raise broken
        return connect(f"file:{path}?mode=ro", uri=True, **named)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", fails)
        with refuses("not_writable", "store", InputError) as refused:
            Store(tmp_path)
    words = str(refused.value)
    assert "left as it is" in words and "move" not in words and "damaged" not in words
    assert digest_of(tmp_path) == before
    with closing(Store(tmp_path)) as again:  # its lock is free
        assert again.get(job.id).status == "queued"


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_said_as_it_is(tmp_path, monkeypatch, number):
    from pathlib import Path

    def fails(*arguments, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", fails)
    with refuses("not_writable", "store", InputError) as refused:
        Store(tmp_path / "store")
    assert os.strerror(number) in str(refused.value)


@pytest.mark.parametrize("damage", ["garbage", "other"])
def test_a_damaged_store_is_still_said_to_be_one(tmp_path, damage):
    if damage == "garbage":
        (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 1000)
    else:
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db:
            db.execute("CREATE TABLE jobs (title TEXT, salary REAL)")
    with refuses("unreadable", "store"):
        Store(tmp_path)


def fallocate_fails(number):
    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("kind", ["full", "read-only", "gone", "replaced"])
def test_without_a_store_none_is_taken_none_begun_and_ready_says_why(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("nexus_rt.serve.dispatcher.PROBE", 0.05)
    with fake(tmp_path) as (address, server, runner):
        runner.gate = asyncio.Event()
        c, store = client(address), tmp_path / "store"
        first = c.videos.create(prompt="running").id
        wait_for(lambda: runner.begun)
        waits = c.videos.create(prompt="waiting").id
        with monkeypatch.context() as patch:
            if kind in ("full", "read-only"):
                number = errno.ENOSPC if kind == "full" else errno.EROFS
                patch.setattr(os, "posix_fallocate", fallocate_fails(number))
            else:
                store.rename(tmp_path / "away")
            if kind == "replaced":
                shutil.copytree(tmp_path / "away", store)
            wait_for(lambda: server.dispatcher.trouble)
            status, _, answer = ask(address, "/ready")
            word = {"gone": "gone", "replaced": "replaced"}.get(kind, kind)
            assert status == 503 and word in answer["reason"] and str(tmp_path) not in str(answer)
            with pytest.raises(openai.InternalServerError) as refused:
                c.videos.create(prompt="x")
            assert refused.value.status_code == 503 and refused.value.code == "storage_failed"
            runner.gate.set()
            wait_for(lambda: not server.dispatcher.live)
            assert runner.begun == ["running"]  # a clip that cannot be kept is not made
            if kind in ("gone", "replaced"):
                shutil.rmtree(store, ignore_errors=True)
                (tmp_path / "away").rename(store)
        wait_for(lambda: ask(address, "/ready")[0] == 200)
        assert c.videos.poll(waits).status == "completed"
        assert first and server.dispatcher.trouble is None


def test_a_store_that_does_not_answer_is_said(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr("nexus_rt.serve.dispatcher.PROBE", 0.05)
    monkeypatch.setattr("nexus_rt.serve.dispatcher.SILENT_STORE", 0.4)
    with fake(tmp_path) as (address, server, _):
        hold = threading.Event()
        monkeypatch.setattr(server.dispatcher.store, "trouble", lambda: hold.wait(20) and None)
        answer = wait_for(lambda: (a := ask(address, "/ready")) and a[0] == 503 and a)
        assert "does not answer" in answer[2]["reason"]
        hold.set()
        wait_for(lambda: ask(address, "/ready")[0] == 200)


def test_deletes_make_room_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_rt.serve.dispatcher.PROBE", 0.05)
    with fake(tmp_path) as (address, server, _):
        c, store = client(address), server.dispatcher.store
        job = c.videos.create_and_poll(prompt="x").id
        folder, delete = tmp_path / "store" / "videos" / job, store.delete
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", fallocate_fails(errno.ENOSPC))

            def full_until_files_go(job_id):
                if folder.exists():
                    raise sqlite3.OperationalError("database or disk is full")
                return delete(job_id)

            patch.setattr(store, "delete", full_until_files_go)
            wait_for(lambda: server.dispatcher.trouble)
            assert c.videos.delete(job).deleted and store.get(job) is None


# --- a store of another form ---


@pytest.mark.parametrize("form", [database.FORM + 1, -1])
def test_a_store_of_another_version_is_left_to_it(tmp_path, form):
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db:
        db.executescript(f"CREATE TABLE jobs (id TEXT); PRAGMA user_version = {form}")
    before = digest_of(tmp_path)
    with refuses("unsupported", "store") as refused:
        Store(tmp_path)
    assert f"form {form}" in str(refused.value)
    assert digest_of(tmp_path) == before


def test_the_tables_are_made_whole_or_not_at_all(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(database, "SCHEMA", database.SCHEMA + "; INSERT INTO nowhere VALUES (1)")
        with refuses("not_writable", "store"):
            Store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == []
        assert db.execute("PRAGMA user_version").fetchone()[0] == 0
    with closing(Store(tmp_path)) as store:
        assert store.get(put(store).id).status == "queued"


# --- clips on disk ---


def test_a_clip_is_on_disk_before_its_job_is_completed(tmp_path, monkeypatch):
    with fake(tmp_path) as (address, server, _):
        store, happened = server.dispatcher.store, []
        fsync, rename, complete = os.fsync, clips.Path.rename, store.complete

        def record_fsync(handle):
            happened.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
            return fsync(handle)

        def record_rename(self, target):
            happened.append(("rename", str(target)))
            return rename(self, target)

        def record_complete(job, *arguments):
            happened.append(("complete", job.id))
            return complete(job, *arguments)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(clips.Path, "rename", record_rename)
        monkeypatch.setattr(store, "complete", record_complete)
        job = client(address).videos.create_and_poll(prompt="x").id
        videos = str(tmp_path / "store" / "videos")
        part = f"{videos}/{job}.part"
        assert happened == [
            *(("fsync", f"{part}/{name}") for name in FILES.values()),
            ("fsync", part),
            ("rename", f"{videos}/{job}"),
            ("fsync", videos),
            ("complete", job),
        ]


@pytest.mark.parametrize("nth", range(5))
def test_a_clip_that_cannot_be_synced_leaves_nothing(tmp_path, monkeypatch, nth):
    count = iter(range(10))

    def fails(handle):
        if next(count) == nth:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        write_clip(tmp_path / "a", Clip("a", b"mp4", b"webp", b"jpeg", {}))
    assert not list(tmp_path.iterdir())


# --- keys ---


def test_one_keys_full_queue_and_results_are_its_own_429(tmp_path):
    keys = ("first-key-12", "second-key-12")
    with fake(tmp_path, FakeRunner(size=60_000), api_keys=keys, max_queue=3, quota=220_000) as (
        address,
        _,
        runner,
    ):
        runner.gate = asyncio.Event()
        one, two = (client(address, key) for key in keys)
        one.videos.create(prompt="running")
        wait_for(lambda: runner.begun)
        for i in range(3):
            one.videos.create(prompt=f"one {i}")
        with pytest.raises(openai.RateLimitError) as refused:
            one.videos.create(prompt="one too many")
        assert refused.value.code == "queue_full" and "of this key" in refused.value.message
        assert int(refused.value.response.headers["retry-after"]) >= 1
        ids = [two.videos.create(prompt=f"two {i}").id for i in range(1)]
        runner.gate.set()
        runner.gate = None
        assert all(two.videos.poll(i).status == "completed" for i in ids)
        wait_for(lambda: all(v.status == "completed" for v in one.videos.list()))
        with pytest.raises(openai.RateLimitError) as refused:  # its results are past its share
            one.videos.create(prompt="more")
        assert refused.value.code == "insufficient_quota"
        assert "this key's results" in refused.value.message


# --- memory ---


def from_real(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


def wrapped(cause, kind=ModelError):
    try:
        try:
            raise cause
        except Exception as error:
            if kind is DecodeError:
                raise DecodeError("decoding failed", None) from error
            raise kind("it cannot be loaded") from error
    except NexusError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "host"),
        (from_real(lambda: torch.empty(2**50)), "host"),
        (from_real(lambda: np.empty(2**50)), "host"),
        (from_real(lambda: bytearray(2**62)), "host"),
        (RuntimeError("std::bad_alloc"), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"), "host"),
        (wrapped(MemoryError()), "host"),
        (wrapped(from_real(lambda: torch.empty(2**50)), DecodeError), "host"),
        (torch.OutOfMemoryError("CUDA out of memory."), "device"),
        (RuntimeError("CUDA error: out of memory"), "device"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "device"),
        (wrapped(torch.OutOfMemoryError("x"), DecodeError), "device"),
        (ModelError("the prompt 'std::bad_alloc' is odd"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("shape mismatch"), None),
        (wrapped(ValueError("x")), None),
    ],
)
def test_which_memory_ran_out(error, expected):
    assert exhausted(error) == expected


def test_a_context_that_was_handled_is_no_cause():
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise RuntimeError("of something else") from None
    except RuntimeError as error:
        assert exhausted(error) is None


def test_kills_by_the_kernel_are_told_from_others(tmp_path, monkeypatch):
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(exhaustion, "VMSTAT", vmstat)
    assert exhaustion.oom_kills() == 0  # a system that does not count
    vmstat.write_text("nr_free_pages 5\noom_kill 7\noom_kill_other 9\n")
    assert exhaustion.oom_kills() == 7
    assert killed_for_memory(-signal.SIGKILL, 6)
    assert not killed_for_memory(-signal.SIGKILL, 7)  # an operator's
    assert not killed_for_memory(70, 6) and not killed_for_memory(None, 6)
    import resource

    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: infinite)
    assert not killed_for_memory(-signal.SIGABRT, 6)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**30, 2**40))
    assert killed_for_memory(-signal.SIGABRT, 6)


def starving(vmstat):
    """A pair whose calls end as their prompt says, where the machine's memory is exhausted."""
    from nexus_rt.serve import generate

    encode = generate.encode

    def starve(components, request, prompts, on_stage):
        text = str(prompts.texts)
        if "allocate" in text:
            torch.empty(2**50)
        if "killed" in text:  # as the kernel does, which counts
            from pathlib import Path

            Path(vmstat).write_text("oom_kill 8\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(components, request, prompts, on_stage)

    generate.encode = starve
    return NexusPipeline.from_pretrained()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.process
def test_a_worker_without_host_memory_fails_its_job_once(tmp_path, monkeypatch):
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("oom_kill 7\n")
    monkeypatch.setattr(exhaustion, "VMSTAT", vmstat)

    async def run():
        runner = ProcessRunner(starving, str(vmstat), warmup=False)
        await runner.start()

        async def fails(prompt):
            with pytest.raises(JobFailed) as failed:
                await runner.run([task(prompt=prompt)], lambda event: None)
            return failed.value

        allocate, killed = await fails("allocate"), await fails("killed")
        assert runner.unable()  # it went down
        await runner.prepare()
        assert runner.unable() is None
        (worker,) = workers()
        os.kill(worker, signal.SIGKILL)  # the count has not grown
        with pytest.raises(WorkerLost):
            await runner.run([task()], lambda event: None)
        await runner.close()
        return allocate, killed

    for failure in asyncio.run(run()):
        assert failure.code == "out_of_memory" and "machine's memory" in failure.message
        assert "device" not in failure.message


def no_memory(kind):
    raise MemoryError if kind == "python" else RuntimeError("std::bad_alloc")


@pytest.mark.parametrize("kind", ["python", "cpp"])
@pytest.mark.process
def test_models_that_host_memory_does_not_hold_are_said_to_be_so(kind):
    async def run():
        runner = ProcessRunner(no_memory, kind)
        with refuses("out_of_memory"):
            await runner.start()
        await runner.close()

    asyncio.run(run())


def test_a_stop_that_ends_the_workers_first_costs_no_loss(tmp_path):
    class Stopped(FakeRunner):
        async def run(self, tasks, emit):
            self.begun.append(tasks[0].request.prompt)
            await self.gate.wait()
            raise WorkerLost("the cluster stops")

    runner = Stopped()
    with fake(tmp_path, runner, grace=5.0) as (address, server, _):
        runner.gate = asyncio.Event()
        job = client(address).videos.create(prompt="x").id
        wait_for(lambda: runner.begun)
        server.dispatcher.stopping = True
        runner.gate.set()
        wait_for(lambda: not server.dispatcher.live)
        row = server.dispatcher.store.get(job)
        assert (row.status, row.losses) == ("queued", 0)
