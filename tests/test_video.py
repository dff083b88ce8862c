"""Files: what was written can be read back, and nothing is half-written."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from nexus_rt.core.amounts import frame_rate
from nexus_rt.core.errors import InputError
from nexus_rt.media.frames import to_uint8
from nexus_rt.media.reading import read_frames, read_metadata
from nexus_rt.media.video import check_output, save_video
from tests.refusals import refuses


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


@pytest.mark.parametrize(
    "frames, size", [(9, (8 * 48, 2 * 32)), (1, (48, 32)), (40, (8 * 48, 2 * 32))]
)
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
    with refuses("not_writable", "path", InputError) as caught:
        save_video(clip(), tmp_path / f"a.{suffix}")
    assert "No space left" in str(caught.value)
    assert (
        os.listdir(tmp_path) == [f"a.{suffix}"]
        and (tmp_path / f"a.{suffix}").read_bytes() == b"the old file"
    )


def test_bad_paths_and_frames(tmp_path):
    with refuses("unknown_name", "output suffix", InputError) as caught:
        check_output(tmp_path / "a.mp3")
    assert "did you mean '.mp4'" in str(caught.value)
    with refuses("not_found", "path", InputError):
        check_output(tmp_path / "no" / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with refuses("invalid_value", "path", InputError):
        check_output(tmp_path / "folder.mp4")
    with refuses("mismatch", "frames", InputError):
        save_video(np.zeros((3, 8, 8)), tmp_path / "a.mp4")


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nexus_rt.media.video.part_file", refuse)
    with refuses("not_writable", "path", InputError) as caught:
        check_output(tmp_path / "a.mp4")
    assert "Permission denied" in str(caught.value)


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
        code = "not_found" if name == "none.mp4" else "unreadable"
        with refuses(code, "path", InputError) as caught:
            read_frames(tmp_path / name)
        assert name in str(caught.value)


def decoded(path, matrix):
    """Frames by FFmpeg's own scaler, told a matrix, whatever the file's tags say."""
    with av.open(str(path)) as container:
        return np.stack(
            [
                f.reformat(
                    format="rgb24",
                    src_colorspace=matrix,
                    dst_colorspace=matrix,
                    src_color_range="MPEG",
                ).to_ndarray()
                for f in container.decode(video=0)
            ]
        )


def psnr(a, b):
    return 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean())


@pytest.mark.parametrize("size", [(1280, 720), (64, 48)])
def test_mp4_is_bt709_and_says_so(tmp_path, size):
    frames = np.zeros((3, size[1], size[0], 3), np.uint8)
    for i, colour in enumerate([(0, 255, 0), (255, 0, 0), (20, 60, 240)]):
        frames[:, :, i * size[0] // 3 :] = colour
    path = save_video(frames, tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (
            context.colorspace,
            context.color_primaries,
            context.color_trc,
            context.color_range,
        ) == (1, 1, 1, 1)
    told, read = decoded(path, "ITU709"), read_frames(path)
    # away from the edge of a colour, which chroma smears
    inside = (
        slice(None),
        slice(None),
        slice(0, size[0] // 4),
    )
    assert psnr(told[inside], frames[inside]) > 45 and np.abs(told.astype(int) - read).max() <= 1
    assert psnr(decoded(path, "ITU601")[inside], frames[inside]) < 30  # the matrix matters
    assert np.abs(read[0, size[1] // 2, 5].astype(int) - (0, 255, 0)).max() <= 2


def test_the_same_frames_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), dtype=np.uint8)
    files = [
        save_video(rng, tmp_path / f"{i}.mp4", metadata={"seed": 1}).read_bytes() for i in range(3)
    ]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    "flags, asm",
    [
        (["avx2", "avx512f", "sse4_2"], "asm=AVX2"),
        (["avx2"], None),
        (["asimd"], None),
        ([], None),
    ],
)
def test_x264_is_kept_from_code_that_is_not_the_same_twice(flags, asm, monkeypatch, tmp_path):
    """Only where AVX-512 is there: forced elsewhere, it would be code the processor lacks."""
    from nexus_rt.media import video

    real = video.instruction_sets()
    monkeypatch.setattr(video, "instruction_sets", lambda: flags)
    assert video.x264_options().get("x264-params") == asm
    if asm is None or "avx2" in real:
        frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
        assert save_video(frames, tmp_path / "a.mp4").stat().st_size > 100


@pytest.mark.slow
def test_a_thousand_files_of_the_same_frames(tmp_path):
    rng = np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), dtype=np.uint8)
    kept = {save_video(rng, tmp_path / "a.mp4").read_bytes() for _ in range(1000)}
    assert len(kept) == 1


@pytest.mark.parametrize(
    "fps, rate",
    [
        (23.976, (24000, 1001)),
        (29.97, (30000, 1001)),
        (59.94, (60000, 1001)),
        ("30000/1001", (30000, 1001)),
        ("24", (24, 1)),
        (Fraction(25, 2), (25, 2)),
        (0.5, (1, 2)),
        (12.5, (25, 2)),
        (np.float64(16), (16, 1)),
        ("23.976", (24000, 1001)),
    ],
)
def test_rational_rates(tmp_path, fps, rate):
    with av.open(str(save_video(clip(), tmp_path / "a.mp4", fps))) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(*rate)
        assert float(stream.duration * stream.time_base) == pytest.approx(
            9 / Fraction(*rate), rel=1e-3
        )


@pytest.mark.parametrize(
    "fps", [0, -1, float("nan"), float("inf"), "x", None, True, 1e9, 0.01, "1/0", [16], "0"]
)
def test_rates_that_are_none(tmp_path, fps):
    for name in ("a.mp4", "a.gif", "a.png"):
        with refuses("out_of_range", "fps", InputError):
            save_video(clip(), tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [16, 30, 60, 100, 7, 0.5, "24000/1001"])
@pytest.mark.parametrize("still", [False, True])
def test_gif_keeps_its_frames_and_its_duration(tmp_path, fps, still):
    frames = (
        np.full((13, 32, 48, 3), 100, np.uint8)
        if still
        else np.random.default_rng(0).integers(0, 255, (13, 32, 48, 3))
    )
    path = save_video(frames, tmp_path / "a.gif", fps)
    with Image.open(path) as image:
        assert image.n_frames == 13 == len(read_frames(path)) and image.info["loop"] == 0
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert (
        abs(sum(times) - 13_000 / frame_rate(fps)) <= 5
        and min(times) >= 10
        and max(times) - min(times) <= 10
    )


def test_gif_shows_at_most_100_frames_a_second(tmp_path):
    with pytest.warns(UserWarning, match="at most 100 frames per second: 20 of 24 are kept"):
        path = save_video(
            np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3)), tmp_path / "a.gif", 120
        )
    with Image.open(path) as image:
        assert sum(f.info["duration"] for f in ImageSequence.Iterator(image)) == 200


@pytest.mark.parametrize("size", [(31, 33), (32, 33), (31, 32), (1, 1)])
def test_odd_sides_are_padded_and_said(tmp_path, size):
    frames = np.full((3, *size, 3), 80, np.uint8)
    with pytest.warns(UserWarning, match="mp4 needs even sides"):
        back = read_frames(save_video(frames, tmp_path / "a.mp4"))
    assert (
        back.shape == (3, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
        and np.abs(back.astype(int) - 80).max() <= 2
    )
    assert read_frames(save_video(frames, tmp_path / "a.gif")).shape == (3, *size, 3)


HALF = np.full((2, 32, 32, 3), 0.5)


@pytest.mark.parametrize(
    "frames",
    [
        HALF,
        HALF.astype(np.float16),
        HALF.astype(np.float32),
        torch.from_numpy(HALF).bfloat16(),
        torch.from_numpy(HALF).requires_grad_(),
        (HALF * 255).round().astype(np.int64),
        (HALF * 255).round().astype(np.int16),
        (HALF * 255).round().astype(np.uint32),
        torch.full((2, 32, 32, 3), 128, dtype=torch.uint8),
        [Image.new("RGB", (32, 32), (128,) * 3)] * 2,
    ],
    ids=[
        "float64",
        "float16",
        "float32",
        "bfloat16",
        "grad",
        "int64",
        "int16",
        "uint32",
        "uint8",
        "pillow",
    ],
)
def test_every_type_of_frames_means_what_it_says(frames):
    assert set(np.unique(to_uint8(frames))) <= {127, 128} and to_uint8(frames).dtype == np.uint8


@pytest.mark.parametrize(
    "frames, code, words",
    [
        (np.full((2, 8, 8, 3), 200.0), "out_of_range", "float64 from 200 to 200"),
        (np.full((2, 8, 8, 3), 300), "out_of_range", "int64 from 300"),
        (np.full((2, 8, 8, 3), -1), "out_of_range", "int64 from -1"),
        (np.full((2, 8, 8, 3), 90, np.uint16), "invalid_type", "uint16"),
        (np.full((2, 8, 8, 3), np.nan), "not_finite", ""),
        (np.full((2, 8, 8, 3), np.inf), "not_finite", ""),
        (np.zeros((2, 8, 8, 3), bool), "invalid_type", "bool"),
        (np.zeros((2, 3, 8, 8)), "mismatch", "(2, 3, 8, 8)"),
        (np.zeros((0, 8, 8, 3)), "mismatch", "(0, 8, 8, 3)"),
        (np.zeros((2, 0, 8, 3)), "mismatch", "(2, 0, 8, 3)"),
        (np.array([["x"]]), "mismatch", "(1, 1)"),
        (np.zeros((2, 8, 8, 3), complex), "invalid_type", "complex128"),
    ],
)
def test_frames_that_mean_nothing_are_refused(tmp_path, frames, code, words):
    with refuses(code, "frames", InputError) as caught:
        save_video(frames, tmp_path / "a.mp4")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_truncation_is_the_published_rounding():
    assert to_uint8(np.full((1, 1, 1, 3), 0.999), truncate=True)[0, 0, 0, 0] == 254
    assert to_uint8(np.full((1, 1, 1, 3), 0.999))[0, 0, 0, 0] == 255


def test_what_made_a_clip_is_in_it(tmp_path):
    made = {
        "prompt": "ein Stern\u2028bewegt sich",
        "seed": 2**63,
        "plan": "small:1 large:*",
        "versions": {"torch": "2.13"},
    }
    assert read_metadata(save_video(clip(), tmp_path / "a.mp4", metadata=made)) == made
    assert read_metadata(save_video(clip(), tmp_path / "b.mp4")) == {}
    with refuses("not_found", "path", InputError):
        read_metadata(tmp_path / "none.mp4")
