"""Files: what was written can be read back, and nothing is half-written."""

import os

import av
import numpy as np
import pytest
from PIL import Image

from nexus_rt.errors import InputError
from nexus_rt.video import check_output, read_frames, save_video


def clip(frames=9, height=32, width=48):
    """A smooth clip: a bright bar that moves, over a ramp."""
    x = np.linspace(0, 1, width)[None, None, :, None] * np.ones((frames, height, 1, 3))
    for i in range(frames):
        x[i, :, 4 * i : 4 * i + 8] = (0.9, 0.2, 0.1)
    return x.astype(np.float32)


def test_mp4_reads_back(tmp_path):
    frames = clip()
    path = save_video(frames, tmp_path / "out.mp4", fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8 and (stream.width, stream.height) == (48, 32)
        back = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert back.shape == (9, 32, 48, 3)
    mse = ((back / 255.0 - frames) ** 2).mean()
    assert 10 * np.log10(1 / mse) >= 25  # colour is stored at half resolution


def test_gif_reads_back(tmp_path):
    path = save_video(clip(), tmp_path / "out.gif")
    with Image.open(path) as image:
        assert image.n_frames == 9 and image.size == (48, 32)


@pytest.mark.parametrize("frames, size", [(9, (8 * 48, 2 * 32)), (1, (48, 32)), (40, (8 * 48, 2 * 32))])
def test_png_is_a_contact_sheet(tmp_path, frames, size):
    path = save_video((clip(9)[np.arange(frames) % 9] * 255).astype(np.uint8), tmp_path / "out.png")
    with Image.open(path) as image:
        assert image.size == size
        assert np.array_equal(np.asarray(image)[:32, :48], (clip()[0] * 255).astype(np.uint8))


def test_nothing_but_the_file_is_left(tmp_path):
    for suffix in ("mp4", "gif", "png"):
        save_video(clip(), tmp_path / f"a.{suffix}")
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.mp4", "a.png"]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, suffix):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / f"a.{suffix}").write_bytes(b"the old file")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        save_video(clip(), tmp_path / f"a.{suffix}")
    assert os.listdir(tmp_path) == [f"a.{suffix}"] and (tmp_path / f"a.{suffix}").read_bytes() == b"the old file"


def test_bad_paths_and_frames(tmp_path):
    with pytest.raises(InputError, match="did you mean '.mp4'"):
        check_output(tmp_path / "a.mp3")
    with pytest.raises(InputError, match="does not exist"):
        check_output(tmp_path / "no" / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path / "folder.mp4")
    with pytest.raises(InputError, match="expected .frames, height, width, 3"):
        save_video(np.zeros((3, 8, 8)), tmp_path / "a.mp4")


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(InputError, match="cannot be written .Permission denied."):
        check_output(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_every_frame_is_read_back(suffix, tmp_path):
    frames = clip(7)
    back = read_frames(save_video(frames, tmp_path / f"a{suffix}"))
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert ((back / 255.0 - frames) ** 2).mean() < 1e-3


def test_what_is_no_video_says_so(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video at all")
    (tmp_path / "b.mp4").write_bytes(save_video(clip(), tmp_path / "c.mp4").read_bytes()[:200])
    for name in ("a.mp4", "b.mp4", "none.mp4"):
        with pytest.raises(InputError, match=f"{name} (cannot be read as a video|holds no frames)"):
            read_frames(tmp_path / name)
