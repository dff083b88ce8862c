"""A batch on a local Ray: two workers, one of them killed, and every clip there once."""

import json
import os
import signal
from pathlib import Path

import pytest

from nexus_rt import BlendConfig, InputError, NexusPipeline
from nexus_rt.pipeline import batch_clips
from nexus_rt.pipeline.batch_job import Job
from nexus_rt.pipeline.batch_ray import run_on_ray
from nexus_rt.pipeline.prompts import Item
from nexus_rt.pipeline.settings import CallSettings
from tests.conftest import RAY_SETTINGS
from tests.needs import needs
from tests.refusals import refuses

needs("ray")
pytestmark = pytest.mark.ray
QUICK = dict(height=32, width=48, num_frames=5, num_inference_steps=2, plan="small:1 large:1")
SETTINGS = CallSettings(**QUICK)


def make(models):
    """A pipeline in whose process denoising is deadly: once where the frame is 80 wide, whenever it
    is 64."""
    marker, right = Path(models["marker"]), batch_clips.denoise

    def deadly(components, request, *rest):
        first = request.size.width == 80 and not marker.exists()
        if first:
            marker.touch()
        if first or request.size.width == 64:
            (marker.parent / f"death{os.getpid()}").touch()  # two may die at once
            os.kill(os.getpid(), signal.SIGKILL)
        return right(components, request, *rest)

    batch_clips.denoise = deadly
    pipe = NexusPipeline.from_pretrained(models["pair"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_the_example_is_a_program(tiny_pair, tmp_path, monkeypatch):
    """It starts a Ray of its own."""
    for name, value in RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    examples = Path(__file__).resolve().parent.parent / "examples"
    monkeypatch.setenv("PYTHONPATH", str(examples))
    monkeypatch.syspath_prepend(examples)
    import batch_on_ray

    monkeypatch.setattr(batch_on_ray, "SETTINGS", SETTINGS)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    clips = tmp_path / "clips"
    made = batch_on_ray.main(prompts, clips, str(tiny_pair))
    assert made == {"made": 2, "kept": 0, "failed": 0}
    assert sorted(p.name for p in clips.glob("*.mp4")) == ["0000.mp4", "0001.mp4"]


def test_two_workers_one_killed_no_clip_lost_or_doubled(tiny_pair, tmp_path, local_ray):
    items = [Item(f"c{i}", "a red circle", seed=i) for i in range(8)]
    own = {"blend": BlendConfig(split="dct"), "timesteps": (999.0, 500.0)}
    own["num_inference_steps"] = None  # not the job's
    items[1] = Item("c1", "a red \ud83d\ude00 circle", settings=own)
    once, always = ({"width": width, "height": 32} for width in (80, 64))
    items[3] = Item("c3", "a red circle", settings=once)  # kills its worker
    items[5] = Item("c5", "a red circle", settings=always)  # kills every worker that tries it
    job, said = Job(tmp_path / "out", suffix=".png", settings=SETTINGS), []
    told = {"pair": str(tiny_pair), "marker": str(tmp_path / "killed")}
    assert run_on_ray(make, told, items, job, 2, said.append, attempts=2) == {
        "made": 7,
        "kept": 0,
        "failed": 1,
    }
    rows = [
        json.loads(line)
        for p in job.folder.glob("results*.jsonl")
        for line in p.read_text().splitlines()
    ]
    assert len(list(tmp_path.glob("death*"))) == 1 + 2
    ended = sorted((r["id"], r["status"]) for r in rows if r["status"] != "begun")
    assert ended == sorted((i.id, "failed" if i.id == "c5" else "done") for i in items)  # each once
    assert {p.stem for p in job.folder.glob("*.png")} == {i.id for i in items} - {"c5"}
    assert len({p.name for p in job.folder.glob("results.*.jsonl")}) >= 2 and not list(
        job.folder.glob(".*")
    )
    changed = next(r["settings"] for r in rows if r["id"] == "c1" and r["status"] == "done")
    assert changed["options"]["timesteps"] == "[999.0, 500.0]" and changed["steps"] == 2
    assert "split='dct'" in changed["options"]["blend"]
    assert "died 2 times" in next(r["error"] for r in rows if r["status"] == "failed")
    assert any("c5: FAILED" in line for line in said)
    again = run_on_ray(make, told, items[:3], job, 1)
    assert again == {"made": 0, "kept": 3, "failed": 0}


def test_more_workers_than_there_is_room_for(tmp_path, local_ray):
    job = Job(tmp_path / "out", settings=SETTINGS)
    with refuses("out_of_range", "workers", InputError):
        run_on_ray(make, {}, [Item("a", "a")], job, 999)
    with refuses("out_of_range", "workers", InputError):
        run_on_ray(make, {}, [Item("a", "a")], job, 0)
    assert not job.folder.exists()
