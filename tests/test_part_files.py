"""Half-written files and folders: a living writer's stay, a killed one's go with the next run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nexus_rt.bench.results import write_text
from nexus_rt.core import part_files
from nexus_rt.core.errors import InputError
from nexus_rt.core.part_files import (
    ABANDONED_S,
    part_file,
    part_folder,
    remove_orphans,
    scratch_folder,
)
from nexus_rt.loading.convert_parts import made_whole
from nexus_rt.media.video import check_output, save_video
from tests.refusals import refuses

ROOT = Path(__file__).parent.parent
WRITING = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
{code}
"""
WRITERS = {  # what a process does in the folder sys.argv[1] until it is killed
    "clip": """
import numpy, nexus_rt.media.video as video
def slow(frames, part, rate, comment):
    part.write_bytes(b"half a clip"); print("ready", flush=True); time.sleep(600)
video._mp4 = slow
video.save_video(numpy.zeros((5, 16, 16, 3), numpy.uint8), Path(sys.argv[1]) / "a.mp4")
""",
    "page": """
from nexus_rt.bench import results
class Slow(str):
    def isascii(self):
        print("ready", flush=True); time.sleep(600)
results.write_text(Path(sys.argv[1]) / "a.html", Slow("x"))
""",
    "conversion": """
from nexus_rt.loading.convert_parts import made_whole
with made_whole(Path(sys.argv[1]) / "pair") as part:
    (part / "small").mkdir(); (part / "small" / "half").write_bytes(b"x")
    print("ready", flush=True); time.sleep(600)
""",
    "export": """
from nexus_rt.engines import folder
source = Path(sys.argv[1]) / "source"
source.mkdir(); (source / "a").write_bytes(b"x")
def slow(source, part):
    print("ready", flush=True); time.sleep(600)
folder.places = slow
folder.link_tree(source, Path(sys.argv[1]) / "engine")
""",
}


@contextlib.contextmanager
def writing(kind, folder, *before):
    """A process that writes in a folder; killed at the end."""
    code = WRITING.format(root=str(ROOT), code=WRITERS[kind])
    process = subprocess.Popen(
        [*before, sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def parts(folder):
    return sorted(p.name for p in folder.iterdir() if ".part" in p.name)


@pytest.fixture(autouse=True)
def first_of_a_process():
    part_files.look_through.cache_clear()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.process
def test_a_living_writers_part_stays_and_a_killed_ones_goes(kind, tmp_path):
    with writing(kind, tmp_path):
        assert len(parts(tmp_path)) == 1
        assert remove_orphans(tmp_path) == 0 and len(parts(tmp_path)) == 1
    assert len(parts(tmp_path)) == 1  # killed: nobody has cleaned up
    assert remove_orphans(tmp_path) == 1 and parts(tmp_path) == []


def can_unshare():
    words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_unshare(), reason="no process namespaces here")
@pytest.mark.process
def test_a_writer_in_another_container_is_seen(tmp_path):
    """Its process id means nothing here: it is 1 there."""
    with writing("clip", tmp_path, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"):
        assert remove_orphans(tmp_path) == 0 and len(parts(tmp_path)) == 1
    deadline = time.monotonic() + 20
    while remove_orphans(tmp_path) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)  # until the container's processes have ended
    assert parts(tmp_path) == []


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("disk", [0, 254])
def test_another_machines_part_on_a_shared_file_system_goes_after_an_hour(
    folder, disk, tmp_path, monkeypatch
):
    """Its lock may not be seen here. A disk of this machine no other kernel writes."""
    part = tmp_path / f".clip.{'0' * 8}-{'a' * 12}.part{'' if folder else '.mp4'}"
    if folder:
        part.mkdir()
        (part / part_files.LOCK).touch()
        (part / "weights").touch()
    else:
        part.touch()
    monkeypatch.setattr(os, "major", lambda device: disk)
    assert remove_orphans(tmp_path) == (disk != 0)
    if disk:
        return
    old = time.time() - ABANDONED_S - 60
    for path in (*part.glob("*"), part):
        os.utime(path, (old, old))
    if folder:  # a file in it that still changes is a writer's
        os.utime(part / "weights")
        assert remove_orphans(tmp_path) == 0
        os.utime(part / "weights", (old, old))
    assert remove_orphans(tmp_path) == 1 and parts(tmp_path) == []


def test_without_locks_age_decides(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(part_files.fcntl, "flock", none)
    with part_file(tmp_path / "a.mp4") as part:
        part.write_bytes(b"x")
        assert remove_orphans(tmp_path) == 0
        old = time.time() - ABANDONED_S - 60
        os.utime(part, (old, old))
        assert remove_orphans(tmp_path) == 1


def test_only_parts_are_removed(tmp_path):
    kept = ["a.part", ".a.part", ".a.mp4", ".config.part.json", ".x.zzzz.part", "b.0.part.mp4"]
    for name in kept:
        (tmp_path / name).touch()
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    (tmp_path / f".link.{part_files.kernel()}-0.part").symlink_to(other)
    os.mkfifo(tmp_path / f".pipe.{part_files.kernel()}-0.part")
    assert remove_orphans(tmp_path) == 0 and (other / "file").exists()
    assert remove_orphans(tmp_path / "none") == 0 and len(list(tmp_path.iterdir())) == 9


def killed(folder, name="left"):
    """A part of a process of this kernel that has ended."""
    path = folder / f".{name}.{part_files.kernel()}-0a1b2c.part.mp4"
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda f: save_video(np.zeros((2, 16, 16, 3), np.uint8), f / "b.mp4"),
        lambda f: check_output(f / "b.mp4"),
        lambda f: write_text(f / "b.json", "{}"),
        lambda f: made_whole(f / "b").__enter__(),
    ],
)
def test_every_writer_removes_what_is_left_in_its_folder(write, tmp_path):
    left = killed(tmp_path)
    made = write(tmp_path)
    assert not left.exists()
    del made


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    path = tmp_path / "a.mp4"
    with part_file(path) as one, part_file(path) as other:
        assert one != other
        one.write_bytes(b"1")
        other.write_bytes(b"2")
        os.replace(one, path)
        os.replace(other, path)
    assert path.read_bytes() == b"2" and parts(tmp_path) == []


def test_a_failed_block_leaves_nothing(tmp_path):
    for make in (part_file, part_folder):
        with pytest.raises(RuntimeError), make(tmp_path / "a") as part:
            assert part.exists()
            raise RuntimeError("full")
    assert list(tmp_path.iterdir()) == []
    with part_folder(tmp_path / "deep" / "a") as part:
        (part / "x").touch()
    assert os.listdir(tmp_path / "deep" / "a") == ["x"]


def test_scratch_folders_of_killed_processes_go(tmp_path, monkeypatch):
    monkeypatch.setattr(part_files.tempfile, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / f".bench.{part_files.kernel()}-0a.part"
    left.mkdir()
    (left / part_files.LOCK).touch()
    with scratch_folder("bench") as one, scratch_folder("bench") as other:
        assert one != other and not left.exists() and one.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_a_file_s_may_be(tmp_path):
    path = tmp_path / ("é" * 125 + ".mp4")
    save_video(np.zeros((2, 16, 16, 3), np.uint8), path)
    assert path.is_file() and parts(tmp_path) == []
    with refuses("invalid_value", "path", InputError):
        check_output(tmp_path / ("x" * 300 + ".mp4"))
