"""A batch on a local Ray: two workers, one of them killed, and every clip there once."""

import json
import os
import signal
from pathlib import Path

import pytest

from nexus_rt import InputError, NexusPipeline
from nexus_rt.batch import Job
from nexus_rt.batch_ray import run_on_ray
from nexus_rt.prompts import Item

ray = pytest.importorskip("ray")
QUICK = dict(height=32, width=48, num_frames=5, num_inference_steps=2, plan="small:1 large:1")


class Deadly(NexusPipeline):
    """Kills its process in the middle of a clip: once where the frame is 80 wide, whenever it is
    64."""

    marker: Path

    def __call__(self, *args, **options):
        first = options["width"] == 80 and not self.marker.exists()
        if first:
            self.marker.touch()
        if first or options["width"] == 64:
            (self.marker.parent / f"death{os.getpid()}").touch()  # two may die at once
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args, **options)


def make(said):
    pipe = NexusPipeline.from_pretrained(said["pair"])
    pipe.set_progress_bar_config(disable=True)
    pipe.__class__ = Deadly
    vars(pipe)["marker"] = Path(said["marker"])
    return pipe


ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@pytest.fixture
def quiet_ray(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def cluster():
    """One Ray for several tests: a batch uses what runs already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.mark.slow
def test_the_example_is_a_program(tiny_pair, tmp_path, quiet_ray, monkeypatch):
    examples = Path(__file__).resolve().parent.parent / "examples"
    monkeypatch.setenv("PYTHONPATH", str(examples))
    monkeypatch.syspath_prepend(examples)
    import batch_on_ray

    monkeypatch.setattr(batch_on_ray, "OPTIONS", QUICK)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    clips = tmp_path / "clips"
    made = batch_on_ray.main(prompts, clips, str(tiny_pair))
    assert made == {"made": 2, "kept": 0, "failed": 0}
    assert sorted(p.name for p in clips.glob("*.mp4")) == ["0000.mp4", "0001.mp4"]


def test_two_workers_one_killed_no_clip_lost_or_doubled(tiny_pair, tmp_path, cluster):
    items = [Item(f"c{i}", "a red circle", seed=i) for i in range(8)]
    items[3] = Item("c3", "a red circle", size=(80, 32))  # kills its worker once
    items[5] = Item("c5", "a red circle", size=(64, 32))  # kills every worker that tries it
    job, said = Job(tmp_path / "out", suffix=".png", options=QUICK), []
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
    assert "died 2 times" in next(r["error"] for r in rows if r["status"] == "failed")
    assert any("c5: FAILED" in line for line in said)
    again = run_on_ray(make, told, items[:3], job, 1)
    assert again == {"made": 0, "kept": 3, "failed": 0}


def test_more_workers_than_there_is_room_for(tmp_path, cluster):
    job = Job(tmp_path / "out", options=QUICK)
    with pytest.raises(InputError, match="--workers is 999, and the cluster has"):
        run_on_ray(make, {}, [Item("a", "a")], job, 999)
    with pytest.raises(InputError, match="--workers is 0"):
        run_on_ray(make, {}, [Item("a", "a")], job, 0)
    assert not job.folder.exists()
