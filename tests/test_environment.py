"""Users without a home, programs without a console, disks that take nothing."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from nexus_rt import InputError, ModelError, NexusPipeline, save_video
from nexus_rt.cli import COMMANDS, main
from nexus_rt.cli.streams import console
from nexus_rt.core.checks import number, whole
from nexus_rt.core.devices import as_device, as_dtype
from nexus_rt.core.paths import as_path, cache_root, check_folder, check_outputs, failed_file
from nexus_rt.core.progress import progress_bar
from nexus_rt.core.tracing import record
from nexus_rt.loading.formats.safetensors import write_shards
from nexus_rt.media.reading import read_frames
from tests.refusals import refuses

PROMPT = "a red circle moves left"


@pytest.fixture
def nobody(monkeypatch):
    """A user whom the system knows no home of."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "NEXUS_RT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_the_cache_of_a_user_without_a_home(nobody, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"nexus_rt-cache-{os.getuid()}"
    assert cache_root() == own / "nexus_rt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))  # no home is looked for
    assert cache_root() == tmp_path / "xdg" / "nexus_rt"
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "named"))
    assert cache_root() == tmp_path / "named"


def test_somebody_elses_cache_is_not_read(nobody, tmp_path, monkeypatch):
    """Engines are code: a folder that others may have planted is none of ours."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / f"nexus_rt-cache-{os.getuid()}").symlink_to(tmp_path / "other")
    with refuses("not_writable", kind=InputError) as caught:
        cache_root()
    assert "NEXUS_RT_CACHE" in str(caught.value)


@pytest.mark.parametrize("xdg", ["", "relative/folder", None])
def test_a_cache_folder_that_is_not_absolute_is_not_used(monkeypatch, tmp_path, xdg):
    monkeypatch.delenv("NEXUS_RT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if xdg is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_root() == tmp_path / ".cache" / "nexus_rt"


def test_a_call_needs_no_home_and_no_cache(nobody, tiny_pair, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/none")
    pipe = NexusPipeline.from_pretrained(tiny_pair, attention="auto")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, num_inference_steps=2, output_type="latent").frames.isfinite().all()


@pytest.mark.parametrize(
    "value, code",
    [
        ("~nobody-of-this-name/x", "not_found"),
        ("a" * 300, "invalid_value"),
        ("x\0y", "invalid_value"),
        ("\ud800", "invalid_value"),
        (7, "invalid_type"),
        (b"x", "invalid_type"),
        (None, "invalid_type"),
    ],
)
def test_what_is_no_path(value, code):
    with refuses(code, "--output", InputError):
        as_path("--output", value)


def test_a_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("path", "~/a") == tmp_path / "a"


@pytest.mark.parametrize(
    "name", ["cuda", "cuda:99", "gpu", "mps", "meta", "cpu:7", "", " cpu", 1.5]
)
def test_devices_that_cannot_be(name, tiny_pair):
    if torch.cuda.is_available() and name == "cuda":
        pytest.skip("a GPU is here")
    with refuses("not_found", "device", InputError):
        as_device("device", name)
    with refuses("not_found", "device", InputError):
        NexusPipeline.from_pretrained(tiny_pair, device=name)
    with refuses("not_found", "device", InputError):
        NexusPipeline.from_engines(tiny_pair, device=name)


def test_devices_that_are_there():
    assert as_device("device", "cpu:0") == torch.device("cpu") == as_device("device", "cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "auto", torch.int8, torch.complex64, torch.bool, 16])
def test_dtypes_that_cannot_be(dtype, tiny_pair):
    code = "unsupported" if isinstance(dtype, torch.dtype) else "invalid_type"
    with refuses(code, "torch_dtype", InputError):
        as_dtype("torch_dtype", dtype)
    with refuses(code, "torch_dtype", InputError):
        NexusPipeline.from_pretrained(tiny_pair, torch_dtype=dtype)


def test_numbers_of_another_kind_are_refused_in_words_that_fit():
    for value, low, code, words in (
        (17.0, 1, "invalid_type", "n is 17.0; expected a whole number, such as 17."),
        (17.5, 1, "invalid_type", "n is 17.5; expected a whole number of at least 1."),
        ("x", -5, "invalid_type", "n is 'x'; expected a whole number."),
        (10**5000, 1, "out_of_range", "n is a whole number of"),
        (True, 0, "invalid_type", "n is True; expected a whole number of at least 0."),
    ):
        with refuses(code, "n", InputError) as caught:
            whole("n", value, low, 100)
        assert str(caught.value).startswith(words)
    for value in (None, "1", True, float("nan"), [1.0], 1j):
        code = "out_of_range" if isinstance(value, float) else "invalid_type"
        with refuses(code, "x", InputError):
            number("x", value, 0, 1)


# streams


def without_streams(monkeypatch):
    """In a test's body: pytest puts its own streams there after the fixtures."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)


def test_a_call_without_streams(monkeypatch, tiny_pair):
    without_streams(monkeypatch)
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    assert pipe(PROMPT, num_inference_steps=2, output_type="latent").frames.isfinite().all()


def test_commands_without_streams(monkeypatch, tiny_pair, tmp_path):
    without_streams(monkeypatch)
    line = ["generate", PROMPT, "--pair", str(tiny_pair), "--steps", "2"]
    assert main([*line, "-o", str(tmp_path / "a.png"), "--log-level", "info"]) == 0
    assert main([*line, "-o", str(tmp_path / "no" / "a.png")]) == 2
    assert main(["plan", "--pair", str(tiny_pair), "--costs", "10,100"]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert sys.stdout is None and sys.stderr is None
    assert os.listdir(tmp_path) == ["a.png"]


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), ValueError("closed file")],
)
def test_a_bar_whose_stream_fails_ends_no_call(tiny_pair, monkeypatch, error):
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    monkeypatch.setattr(sys, "stderr", Gone(error))
    assert pipe(PROMPT, num_inference_steps=2, output_type="latent").frames.isfinite().all()


def test_a_bar_is_drawn_where_there_is_a_stream():
    stream = io.StringIO()
    with progress_bar(total=2, file=stream) as bar:
        bar.update(2)
    assert "2/2" in stream.getvalue()
    stream.close()
    with progress_bar(total=2, file=stream) as bar:
        assert bar.disable


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:surrogateescape"])
def test_a_console_that_cannot_encode_a_path(monkeypatch, encoding):
    coding, _, errors = encoding.partition(":")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, coding, errors or "strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with console(own=False):
        print("クリップ.mp4")
    assert raw.getvalue().startswith(b"\\u30af") and stream.errors == (errors or "strict")


def run(words, folder, shell="", **environment):
    line = f'exec "{sys.executable}" -m nexus_rt.cli {words} {shell}'
    return subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.process
def test_closed_descriptors_are_not_the_clips(tiny_pair, tmp_path, closed):
    """A file that a process opens would be its descriptor 1, with what is printed in it."""
    words = f"generate '{PROMPT}' --pair {tiny_pair} --steps 2 -o a.mp4"
    done = run(words, tmp_path, closed)
    assert done.returncode == 0, done.stderr
    assert read_frames(tmp_path / "a.mp4").shape == (5, 32, 48, 3)


@pytest.mark.process
def test_a_path_that_the_console_cannot_encode(tiny_pair, tmp_path):
    words = f"generate '{PROMPT}' --pair {tiny_pair} --steps 2 -o クリップ.mp4"
    done = run(words, tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\u30af") and (tmp_path / "クリップ.mp4").is_file()
    (tmp_path / "p.txt").write_text(PROMPT)
    words = f"batch p.txt --pair {tiny_pair} --steps 2 -o 出力"
    done = run(words, tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_a_full_standard_output_is_one_sentence(tmp_path):
    done = run("doctor", tmp_path, "> /dev/full")
    assert done.returncode == 1 and b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


# disks and memory


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y cannot be used"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied"),
        (OSError("no number"), "a file cannot be used .no number."),
        (MemoryError(), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out"),
    ],
)
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_command_ends_in_a_traceback(monkeypatch, capsys, command, error, words):
    def fail(args):
        raise error

    monkeypatch.setattr(COMMANDS[command], "run", fail)
    lines = {
        "generate": [PROMPT],
        "batch": ["p.txt", "-o", "x"],
        "decode": ["x.safetensors"],
        "export": ["-o", "x"],
        "engines": ["list"],
        "convert": ["wan", "a", "b"],
        "tune": ["-o", "x"],
        "vrbench": ["report", "x"],
    }
    assert main([command, *lines.get(command, [])]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_an_error_of_another_kind_is_not_hidden(monkeypatch):
    def fail(args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(COMMANDS["doctor"], "run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["doctor"])


def test_what_cannot_be_written_is_named_with_what_to_do():
    full, locked = OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "read-only")
    assert failed_file("x", full) == (
        "x cannot be used (full); free some space, or write somewhere else."
    )
    assert "permissions" in failed_file("x", locked)


def test_folders_are_tried_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with refuses("not_writable", kind=InputError) as caught:
        check_folder(tmp_path / "file", "choose another")
    assert "File exists" in str(caught.value) and "choose another" in str(caught.value)
    with refuses("not_writable", kind=InputError) as caught:
        check_folder(tmp_path / "file" / "x", "choose another")
    assert "Not a directory" in str(caught.value)
    check_folder(tmp_path / "new" / "folder", "choose another")
    assert os.listdir(tmp_path / "new" / "folder") == []
    with refuses("not_found", "output", InputError):
        check_outputs(str(tmp_path / "none" / "a.json"))


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_converted_weights_on_a_full_disk(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def serialise(*arguments):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", serialise)
    with refuses("not_writable", kind=ModelError) as caught:
        write_shards(tmp_path, "model", [("a", torch.zeros(2))])
    assert "No space left on device" in str(caught.value)


def test_a_trace_on_a_full_disk(tmp_path, monkeypatch):
    with record() as trace:
        pass
    assert json.loads(trace.save(tmp_path / "a.json").read_text())["traceEvents"] == []
    monkeypatch.setattr(Path, "write_text", full)
    with refuses("not_writable", "path", InputError) as caught:
        trace.save(tmp_path / "b.json")
    assert "No space left" in str(caught.value)


def test_latents_are_kept_where_the_clip_cannot_be(tiny_pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.replace", full)
    out = tmp_path / "a.mp4"
    assert main(["generate", PROMPT, "--pair", str(tiny_pair), "--steps", "2", "-o", str(out)]) == 1
    assert "No space left" in (said := capsys.readouterr().err) and "nexus-rt decode" in said
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not out.exists()


# PyAV

FRAME = av.VideoFrame


class OldFrame:
    """Any object of PyAV 13, whose frames have no colour to set: what is newer is not there."""

    NEWER = ("color_primaries", "color_trc")

    def __init__(self, own):
        object.__setattr__(self, "own", own)

    def __getattr__(self, name):
        if name in self.NEWER and isinstance(self.own, FRAME):
            raise AttributeError(name)
        value = getattr(self.own, name)
        return self.wrapped(value) if callable(value) else value

    def __setattr__(self, name, value):
        self.__getattr__(name)
        setattr(self.own, name, value)

    def __enter__(self):
        return OldFrame(self.own.__enter__())

    def __exit__(self, *failure):
        return self.own.__exit__(*failure)

    @staticmethod
    def wrapped(function):
        def call(*arguments, **options):
            plain = [a.own if isinstance(a, OldFrame) else a for a in arguments]
            made = function(*plain, **options)
            kinds = (FRAME, av.VideoStream, av.container.OutputContainer)
            return OldFrame(made) if isinstance(made, kinds) else made

        return call


def test_videos_are_written_with_old_releases_of_pyav(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
    wanted = save_video(frames, tmp_path / "a.mp4").read_bytes()
    for name in ("color_primaries", "color_trc"):
        assert not hasattr(OldFrame(av.VideoFrame(16, 16, "yuv420p")), name)
    monkeypatch.setattr(av, "open", OldFrame.wrapped(av.open))
    monkeypatch.setattr(av, "VideoFrame", OldFrameClass(av.VideoFrame))
    assert save_video(frames, tmp_path / "b.mp4").read_bytes() == wanted


class OldFrameClass:
    """`av.VideoFrame` whose frames are old ones."""

    def __init__(self, own):
        self.from_ndarray = lambda *a, **k: OldFrame(own.from_ndarray(*a, **k))


def test_a_frame_that_cannot_be_encoded_is_an_error_of_ours(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise LookupError("no encoder libx264")

    monkeypatch.setattr(av, "open", refuse)
    with refuses("failed") as caught:
        save_video(np.zeros((1, 16, 16, 3), np.uint8), tmp_path / "a.mp4")
    assert "no encoder libx264" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [{"x": object()}, {"x": "\ud800"}, {(1, 2): 3}, [1], "text"])
def test_metadata_that_no_file_can_keep(tmp_path, metadata):
    code = "invalid_value" if isinstance(metadata, dict) else "invalid_type"
    with refuses(code, "metadata", InputError):
        save_video(np.zeros((1, 16, 16, 3), np.uint8), tmp_path / "a.mp4", metadata=metadata)
    assert not list(tmp_path.iterdir())
