"""Prompt lists and batches: every item has a clip or a reason, nothing is made twice, and nothing
half-made has a name."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from nexus_rt import BlendConfig, InputError, NexusError
from nexus_rt.cli import main
from nexus_rt.core.fields import LIST
from nexus_rt.core.part_files import kernel
from nexus_rt.core.size import ClipSize
from nexus_rt.media.reading import read_frames, read_metadata
from nexus_rt.media.video import save_video
from nexus_rt.pipeline import batch, batch_clips, prompts
from nexus_rt.pipeline.batch import run
from nexus_rt.pipeline.batch_job import Job, parse_shard
from nexus_rt.pipeline.batch_log import Lines, finished, same_clip
from nexus_rt.pipeline.inputs import Prompts
from nexus_rt.pipeline.prompts import Item, read_prompts
from nexus_rt.pipeline.settings import CallSettings, fields
from tests.refusals import refuses

PROMPTS = ["a red circle", "a blue square moves left", "the panda"]
QUICK = dict(height=32, width=48, num_frames=5, num_inference_steps=2, plan="small:1 large:1")
SETTINGS = CallSettings(**QUICK)
SIZE = ClipSize(48, 32, 5)


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_kind_of_list(tmp_path):
    text = written(tmp_path, "a.txt", "# shapes\na red circle\n\n  a blue square \n")
    assert read_prompts(text) == [Item("0000", "a red circle"), Item("0001", "a blue square")]
    rows = [{"prompt": "x", "id": 7, "seed": 3, "size": "64x32", "frames": 9, "negative": "y"}, "z"]
    own = {"width": 64, "height": 32, "num_frames": 9}
    wanted = [Item("7", "x", 3, "y", own), Item("0001", "z")]
    assert read_prompts(written(tmp_path, "a.json", rows)) == wanted
    lines = "\n".join(json.dumps(r) for r in rows) + "\n\n"
    assert read_prompts(written(tmp_path, "a.jsonl", lines)) == wanted
    question = {"id": "q1", "question": "?", "weight": 1, "importance_score": 1}
    prompt = {
        "id": "drf_1",
        "category": "DRF",
        "prompt_en": "a train",
        "evaluation": {"evaluation_questions": [question]},
    }
    folder = tmp_path / "vr"
    folder.mkdir()
    written(folder, "1.json", {"DRF": {"category_description": "d", "prompts": [prompt]}})
    written(folder, "2.json", {"CAR": {"prompts": [{"id": "car_1", "prompt_en": "a dog"}]}})
    assert read_prompts(folder) == [Item("drf_1", "a train"), Item("car_1", "a dog")]


def test_an_entry_has_any_setting_of_a_list_under_its_option(tmp_path):
    values = {
        "frames": (9, 9),
        "steps": (4, 4),
        "guidance": ([4, 3.5], (4.0, 3.5)),
        "guidance_2": (2, 2.0),
        "plan": ("handoff=0.5", "handoff=0.5"),
        "shift": (3, 3.0),
        "blend": ({"split": "dct", "rho_min": 0.2}, BlendConfig(split="dct", rho_min=0.2)),
        "energy": ("progressive", "progressive"),
        "gamma_w": (0.5, 0.5),
        "solver": ("euler", "euler"),
        "as_published": (True, True),
        "rewrite": ("off", "off"),
        "timesteps": ([1000, 500], (1000.0, 500.0)),
        "small_steps": (5, 5),
        "large_steps": (6, 6),
    }
    assert set(values) == set(prompts.list_settings()) == {f.flag for f in fields(LIST).values()}
    row = {"prompt": "x", **{name: given for name, (given, _) in values.items()}}
    (item,) = read_prompts(written(tmp_path, "a.json", [row]))
    wanted = {prompts.list_settings()[name].name: kept for name, (_, kept) in values.items()}
    assert item == Item("0000", "x", settings=wanted)
    nothing = {"prompt": "x", **dict.fromkeys(values)}  # null is the run's own
    assert read_prompts(written(tmp_path, "b.json", [nothing])) == [Item("0000", "x")]


def test_the_document_shows_a_list_and_names_every_setting(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "batch.md").read_text()
    example = re.search(r"```json\n(.*?)```", text, re.S)[1]
    items = read_prompts(written(tmp_path, "a.json", example))
    assert [i.id for i in items] == ["circle", "0001", "0002"]
    assert items[1].settings["blend"] == BlendConfig(split="dct")
    assert [n for n in (*prompts.OWN, *prompts.list_settings()) if f"`{n}`" not in text] == []


@pytest.mark.parametrize(
    "name, content, code, param, place",
    [
        ("a.json", "{", "unreadable", None, "a.json"),
        ("a.jsonl", '"x"\n{', "unreadable", None, "line 2"),
        ("a.json", 3, "invalid_type", None, "a.json"),
        ("a.json", [], "missing", "prompt", "a.json"),
        ("a.txt", "# nothing\n", "missing", "prompt", "a.txt"),
        ("a.csv", "x", "unsupported", None, ".csv"),
        ("a.json", [{"id": "a"}], "missing", "prompt", "[0].prompt"),
        ("a.json", [{"prompt": "x", "seed": "1"}], "invalid_type", "seed", "[0].seed is '1'"),
        ("a.json", [{"prompt": "x", "seed": True}], "invalid_type", "seed", "[0].seed is True"),
        ("a.json", [{"prompt": "x", "seed": -2}], "out_of_range", "seed", "[0].seed is -2"),
        ("a.json", [{"prompt": "x", "size": "big"}], "invalid_value", "size", "[0].size is 'big'"),
        ("a.json", [{"prompt": "x", "size": "9x99999"}], "invalid_value", "size", "[0].size"),
        ("a.json", [{"prompt": "x", "colour": 1}], "unknown_name", "colour", "[0]"),
        ("a.json", [{"prompt": "x", "num_frames": 9}], "unknown_name", "num_frames", "frames"),
        ("a.json", [{"prompt": "x", "height": 32}], "unknown_name", "height", "[0]"),
        ("a.json", [{"prompt": "x", "id": "../../x"}], "invalid_value", "id", "[0].id"),
        (
            "a.json",
            [{"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"}],
            "duplicate",
            "id",
            "'a'",
        ),
        ("a.json", {"DRF": {"prompts": {}}}, "invalid_type", "prompts", "DRF.prompts"),
        ("a.json", {"DRF": {"prompts": [{"id": "x"}]}}, "missing", "prompt_en", "DRF.prompts[0]"),
        ("a.jsonl", '"x"\n{"prompt": "y", "shift": -1}', "out_of_range", "shift", "line 2: shift"),
        ("a.json", [{"prompt": "x", "frames": "9"}], "invalid_type", "frames", "[0]: frames"),
        ("a.json", [{"prompt": "x", "steps": True}], "invalid_type", "steps", "[0]: steps"),
        ("a.json", [{"prompt": "x", "guidance": [1, 2, 3]}], "invalid_value", "guidance", "[0]"),
        ("a.json", [{"prompt": "x", "plan": "round"}], "unknown_name", "plan", "[0]"),
        ("a.json", [{"prompt": "x", "plan": 3}], "invalid_type", "plan", "[0].plan"),
        ("a.json", [{"prompt": "x", "solver": "heun"}], "unknown_name", "solver", "[0]"),
        ("a.json", [{"prompt": "x", "rewrite": " "}], "missing", "rewrite", "[0].rewrite"),
        ("a.json", [{"prompt": "x", "as_published": 1}], "invalid_type", "as_published", "[0]"),
        ("a.json", [{"prompt": "x", "timesteps": "1000"}], "invalid_value", "timesteps", "[0]"),
        ("a.json", [{"prompt": "x", "blend": "dct"}], "invalid_type", "blend", "[0].blend"),
        ("a.json", [{"prompt": "x", "blend": {"split": 3}}], "unknown_name", "split", "[0]"),
        ("a.json", [{"prompt": "x", "blend": {"colour": 3}}], "unknown_name", "blend", "'colour'"),
    ],
)
def test_a_list_that_breaks_its_form_says_where(name, content, code, param, place, tmp_path):
    with refuses(code, param, InputError) as caught:
        read_prompts(written(tmp_path, name, content))
    assert name in str(caught.value) and place in str(caught.value)


def test_no_list_and_no_shard(tmp_path):
    with refuses("not_found", kind=InputError):
        read_prompts(tmp_path / "none.txt")
    with refuses("missing", kind=InputError) as caught:
        read_prompts(tmp_path)
    assert str(tmp_path) in str(caught.value)
    for text in ("0/2", "3/2"):
        with refuses("out_of_range", "shard", InputError):
            Job(tmp_path, shard=parse_shard(text))
    for text in ("x", "1"):
        with refuses("unreadable", "shard", InputError):
            parse_shard(text)


def test_a_job_is_one_clip_of_each_prompt(tmp_path):
    with refuses("unknown_name", "format", InputError):
        Job(tmp_path, suffix=".avi")
    with refuses("invalid_type", "settings", InputError):
        Job(tmp_path, settings=QUICK)
    for name, value in (("num_videos_per_prompt", 2), ("output_type", "pt")):
        with refuses("unsupported", name, InputError):
            Job(tmp_path, settings=CallSettings(**{name: value}))
        with refuses("unsupported", name, InputError):
            Job(tmp_path).settings_of(Item("a", "x", settings={name: value}))


def rows(folder):
    return [
        json.loads(line)
        for path in sorted(folder.glob("results*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_a_batch_is_the_clips_that_single_calls_make(tiny_pipe, tmp_path):
    items = [
        Item("a", PROMPTS[0]),
        Item("b", PROMPTS[1], seed=5),
        Item("c", PROMPTS[2], settings=dict(height=32, width=32, num_frames=1)),
    ]
    job = Job(tmp_path / "out", seed=2, suffix=".png", settings=SETTINGS)
    assert run(tiny_pipe, items, job) == {"made": 3, "kept": 0, "failed": 0}
    assert [r["id"] for r in rows(job.folder)] == ["a", "b", "c"] and {
        r["status"] for r in rows(job.folder)
    } == {"done"}
    assert {p.name for p in job.folder.glob("*.png")} == {"a.png", "b.png", "c.png"}
    for item, seed, change in (
        (items[0], 2, {}),
        (items[1], 5, {}),
        (items[2], 2, dict(height=32, width=32, num_frames=1)),
    ):
        frames = tiny_pipe(
            item.prompt, generator=torch.Generator().manual_seed(seed), **{**QUICK, **change}
        ).frames
        save_video(frames[0], tmp_path / "one.png")
        from PIL import Image, ImageChops

        a, b = Image.open(tmp_path / "one.png"), Image.open(job.clip(item))
        assert (
            a.size == b.size
            and max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 1
        )


def test_the_same_command_makes_nothing_twice_and_other_settings_make_it_again(tiny_pipe, tmp_path):
    items, job = (
        [Item(str(i), p) for i, p in enumerate(PROMPTS)],
        Job(tmp_path, suffix=".png", settings=SETTINGS),
    )
    assert run(tiny_pipe, items, job)["made"] == 3
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")}
    assert run(tiny_pipe, items, job) == {"made": 0, "kept": 3, "failed": 0}
    assert stamps == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")}
    (tmp_path / "1.png").unlink()
    with open(job.results, "a") as file:
        file.write('{"id": "2", "status": "do')  # killed in the middle of a line
    assert run(tiny_pipe, items, job) == {"made": 1, "kept": 2, "failed": 0}
    assert run(tiny_pipe, items, job)["kept"] == 3
    changed = [Item("0", "the panda moves"), Item("1", PROMPTS[1], seed=9), items[2]]
    assert run(tiny_pipe, changed, job) == {"made": 2, "kept": 1, "failed": 0}
    assert (
        run(
            tiny_pipe,
            changed,
            Job(tmp_path, suffix=".png", settings=SETTINGS.replace(plan="large")),
        )["made"]
        == 3
    )


def test_shards_share_the_list_and_know_of_each_other(tiny_pipe, tmp_path):
    items = [Item(str(i), "a red circle", seed=i) for i in range(5)]
    made = [
        run(tiny_pipe, items, Job(tmp_path, suffix=".png", shard=(i, 2), settings=SETTINGS))["made"]
        for i in (1, 2)
    ]
    assert made == [3, 2] and sorted(r["id"] for r in rows(tmp_path)) == list("01234")
    assert run(tiny_pipe, items, Job(tmp_path, suffix=".png", settings=SETTINGS)) == {
        "made": 0,
        "kept": 5,
        "failed": 0,
    }


def test_a_failure_is_recorded_and_the_rest_goes_on(tiny_pipe, tmp_path, monkeypatch):
    items = [
        Item("a", PROMPTS[0]),
        Item("bad", PROMPTS[1], settings={"width": 50}),
        Item("worse", PROMPTS[2]),
        Item("d", PROMPTS[0]),
    ]
    right, calls = batch_clips.save_video, []

    def save(frames, path, *rest, **options):
        calls.append(path.stem)
        if path.stem == "worse" and calls.count("worse") == 1:
            raise OSError(28, "No space left on device")
        return right(frames, path, *rest, **options)

    monkeypatch.setattr(batch_clips, "save_video", save)
    job = Job(tmp_path, suffix=".png", settings=SETTINGS)
    assert run(tiny_pipe, items, job) == {"made": 2, "kept": 0, "failed": 2}
    said = {r["id"]: r for r in rows(tmp_path)}
    assert (
        "width is 50; expected a multiple of 16" in said["bad"]["error"]
        and "No space left" in said["worse"]["error"]
    )
    assert not (tmp_path / "worse.png").exists()
    # what failed is tried again
    assert run(tiny_pipe, items, job) == {
        "made": 1,
        "kept": 2,
        "failed": 1,
    }


@pytest.mark.parametrize("beside", [True, False])
def test_a_clip_is_decoded_beside_the_next_only_where_there_is_room(
    beside, tiny_pipe, tmp_path, monkeypatch
):
    """What a slow decoder holds up, and what it does not."""
    monkeypatch.setattr(batch, "decodes_beside", lambda pipe, size: beside)
    events, decode, denoise = [], batch_clips.decode, batch_clips.denoise

    def slow(*args, **options):
        time.sleep(0.3)
        events.append("decoded")
        return decode(*args, **options)

    def watched(*args):
        events.append("denoised")
        return denoise(*args)

    monkeypatch.setattr(batch_clips, "decode", slow)
    monkeypatch.setattr(batch_clips, "denoise", watched)
    run(
        tiny_pipe, [Item("a", "a"), Item("b", "b")], Job(tmp_path, suffix=".png", settings=SETTINGS)
    )
    assert events == (
        ["denoised", "denoised", "decoded", "decoded"] if beside else ["denoised", "decoded"] * 2
    )


def test_where_there_is_room(tiny_pipe, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for threads, wanted in ((1, True), (2, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert batch_clips.decodes_beside(tiny_pipe, SIZE) == wanted
    need = tiny_pipe.vae.working_bytes(SIZE)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60)
    monkeypatch.setitem(vars(tiny_pipe), "device", torch.device("cuda"))
    # what PyTorch holds and does not use is free too
    for free, wanted in (
        (need - 40, True),
        (need - 41, False),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, n=free: (n, 10**12))
        assert batch_clips.decodes_beside(tiny_pipe, SIZE) == wanted
    monkeypatch.setattr(tiny_pipe, "vram", 10**9)  # a budget was planned for one thing at a time
    assert not batch_clips.decodes_beside(tiny_pipe, SIZE)


def test_a_full_disk_is_one_sentence(tiny_pipe, tmp_path, monkeypatch, capsys):
    def full(self, row):
        raise NexusError(f"{self.path} cannot be written (No space left on device)")

    lines = Lines(tmp_path / "r" / "results.jsonl")
    with refuses("not_writable", kind=NexusError):
        lines.add({"id": "a"})  # its folder is gone
    monkeypatch.setattr(Lines, "add", full)
    with pytest.raises(NexusError, match="No space left"):
        run(
            tiny_pipe,
            [Item("a", "a"), Item("b", "b")],
            Job(tmp_path, suffix=".png", settings=SETTINGS),
        )


def test_a_prompt_that_cannot_be_encoded_fails_alone(tiny_pipe, tmp_path, monkeypatch):
    right = tiny_pipe.text.encode

    def encode(prompts, *rest):
        if "bad" in prompts:
            raise InputError("the prompt is too long")
        return right(prompts, *rest)

    monkeypatch.setattr(tiny_pipe.text, "encode", encode)
    items = [Item("a", PROMPTS[0]), Item("b", "bad"), Item("c", PROMPTS[1])]
    assert run(tiny_pipe, items, Job(tmp_path, suffix=".png", settings=SETTINGS)) == {
        "made": 2,
        "kept": 0,
        "failed": 1,
    }


def test_two_processes_do_not_share_a_shard(tiny_pipe, tmp_path):
    job = Job(tmp_path, settings=SETTINGS)
    with (
        batch.open_folder(job),
        refuses("in_use", "shard", InputError),
    ):
        run(tiny_pipe, [Item("a", "a")], job)


@pytest.mark.process
def test_the_command_resumes_after_a_kill(tiny_pair, tmp_path):
    """Killed outright after the first clip; the second run makes the rest, and no clip twice."""
    prompts = written(tmp_path, "p.txt", "\n".join(["a red circle"] * 6))
    line = [
        sys.executable,
        "-m",
        "nexus_rt.cli",
        "batch",
        str(prompts),
        "-o",
        str(tmp_path / "out"),
        "--pair",
        str(tiny_pair),
        "--steps",
        "4",
        "--format",
        "png",
    ]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "out" / "results.jsonl"
    until = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") >= 1) and time.time() < until:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {r["id"]: r["when"] for r in rows(tmp_path / "out")}
    assert before
    out = subprocess.run(line, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    after = rows(tmp_path / "out")
    # each once: what had a line was kept
    assert sorted(r["id"] for r in after) == [f"{i:04}" for i in range(6)]
    assert all(r["when"] == before[r["id"]] for r in after if r["id"] in before)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} <= {".png", ".jsonl", ".lock"}
    assert f"{6 - len(before)} made, {len(before)} kept, 0 failed" in out.stdout


def test_the_commands_exit_code_says_whether_all_is_there(tiny_pair, tmp_path, capsys):
    prompts = written(tmp_path, "p.json", [{"prompt": "a"}, {"prompt": "b", "frames": 6}])
    line = [
        "batch",
        str(prompts),
        "-o",
        str(tmp_path / "out"),
        "--pair",
        str(tiny_pair),
        "--steps",
        "2",
        "--format",
        "gif",
    ]
    assert main(line) == 1
    said = capsys.readouterr()
    assert "1 made, 0 kept, 1 failed" in said.out and "expected 4k+1" in said.err
    assert os.listdir(tmp_path / "out").count("0000.gif") == 1
    assert (
        main(["batch", str(tmp_path / "none.txt"), "-o", str(tmp_path / "x")]) == 2
        and not (tmp_path / "x").exists()
    )


def groups(monkeypatch):
    """The prompts of every call of `encode`, as a batch makes them."""
    calls, right = [], batch_clips.encode

    def encode(components, request, prompts, **options):
        calls.append(prompts.texts)
        return right(components, request, prompts, **options)

    monkeypatch.setattr(batch_clips, "encode", encode)
    return calls


def test_prompts_are_read_together(tiny_pipe, tmp_path, monkeypatch):
    """One call for eight prompts, whatever their lengths; what is read of one does not depend on
    its neighbours."""
    calls = groups(monkeypatch)
    items = [Item(str(i), " ".join(["red"] * (1 + 3 * i))) for i in range(9)]
    job = Job(tmp_path, suffix=".png", settings=SETTINGS)
    made = {}
    for some in (items, items[2:3]):
        clips = []
        for item in some:
            request = tiny_pipe.request(job.settings)
            prompts = Prompts.of(item.prompt, None, job.settings)
            clips.append(batch_clips.Clip(item, {"settings": {}}, request, prompts))
        told = batch_clips.encode_together(tiny_pipe, clips)
        made[len(some)] = told[len(some) // 4].embeds["prompt_embeds"]
    assert [len(texts) for texts in calls] == [9, 1] and made[9].shape == made[1].shape
    assert torch.allclose(made[9], made[1], atol=1e-5)
    calls.clear()
    run(tiny_pipe, [Item(str(i), "a") for i in range(9)], job)
    assert [len(texts) for texts in calls] == [8, 1]


def test_prompts_of_equal_encoding_are_read_together(tiny_pipe, tmp_path, monkeypatch):
    """Settings that no encoder reads part no group; a text instead of the prompt is each item's."""
    calls = groups(monkeypatch)
    own = [
        {},
        {"plan": "large"},
        {"guidance_scale": 3.0, "num_frames": 9},
        {"plan": "large", "shift": 4.0},
        {"num_frames": 1},
        {"rewrite": "a red square"},
        {"rewrite": "a blue square"},
    ]
    items = [Item(str(i), f"prompt {i}", settings=s) for i, s in enumerate(own)]
    job = Job(tmp_path, suffix=".png", settings=SETTINGS)
    assert run(tiny_pipe, items, job)["made"] == len(own)
    assert [[int(t[-1]) for t in texts] for texts in calls] == [[0, 2], [1, 3], [4], [5, 6]]
    rewritten = {r["id"]: r["settings"].get("rewritten") for r in rows(tmp_path)}
    assert rewritten["5"] == "a red square" and rewritten["6"] == "a blue square"


def test_an_item_is_checked_and_planned_once(tiny_pipe, tmp_path, monkeypatch):
    counts = Counter()

    def counted(module, name):
        right = getattr(module, name)

        def call(*args, **options):
            counts[name] += 1
            return right(*args, **options)

        monkeypatch.setattr(module, name, call)

    from nexus_rt.pipeline import inputs, pipeline

    for name in ("prompt_lists", "check_rewrite"):
        counted(inputs, name)
    for name in ("make_request", "check_request"):
        counted(pipeline, name)
    items = [Item("a", "a"), Item("b", "b"), Item("c", "c", settings={"shift": 4.0})]
    assert run(tiny_pipe, items, Job(tmp_path, suffix=".png", settings=SETTINGS))["made"] == 3
    assert counts == {"prompt_lists": 3, "check_rewrite": 3, "make_request": 2, "check_request": 2}


def test_an_entrys_own_settings_make_its_clip(tiny_pipe, tmp_path):
    """The clip is a call's with them, its row and metadata say them, and others make it again."""
    own = {"shift": 4.0, "guidance_scale": 3.0, "blend": {"split": "dct"}, "num_inference_steps": 3}
    path = written(
        tmp_path,
        "list.json",
        [
            {"prompt": PROMPTS[0]},
            {"prompt": PROMPTS[1], "shift": 4, "guidance": 3, "blend": {"split": "dct"}}
            | {"steps": 3, "plan": "reference", "frames": 1},
        ],
    )
    job = Job(tmp_path / "out", settings=SETTINGS)
    assert run(tiny_pipe, read_prompts(path), job) == {"made": 2, "kept": 0, "failed": 0}
    call = {**QUICK, **own, "plan": "reference", "num_frames": 1}
    frames = tiny_pipe(PROMPTS[1], generator=torch.Generator().manual_seed(0), **call).frames
    save_video(frames[0], tmp_path / "one.mp4")
    one, made = read_frames(tmp_path / "one.mp4"), read_frames(job.clip(Item("0001", "")))
    assert one.shape == made.shape and (one == made).all()
    plain, changed = rows(job.folder)
    assert plain["settings"]["options"] == {"num_inference_steps": "2"}
    assert changed["settings"]["options"]["shift"] == "4.0"
    assert changed["settings"]["steps"] == 3 and changed["settings"]["guidance"] == [3.0, 3.0]
    kept = read_metadata(job.folder / "0001.mp4")["options"]
    assert kept["shift"] == 4.0 and kept["num_frames"] == 1 and "split='dct'" in kept["blend"]
    assert run(tiny_pipe, read_prompts(path), job)["kept"] == 2
    text = path.read_text()
    for old, new in (('"dct"', '"fft"'), ('"guidance": 3', '"guidance": 2')):
        path.write_text(text := text.replace(old, new))
        assert run(tiny_pipe, read_prompts(path), job) == {"made": 1, "kept": 1, "failed": 0}


def test_an_entry_whose_settings_conflict_fails_alone(tiny_pipe, tmp_path):
    """With the job's; a job that no models can make is an error before the first clip."""
    items = [Item("a", PROMPTS[0]), Item("b", PROMPTS[0], settings={"gamma_w": 0.5})]
    items += [Item("c", PROMPTS[0], settings={"colour": 1})]
    job = Job(tmp_path, suffix=".png", settings=SETTINGS)
    assert run(tiny_pipe, items, job) == {"made": 1, "kept": 0, "failed": 2}
    errors = {r["id"]: r.get("error", "") for r in rows(tmp_path)}
    assert "gamma_w" in errors["b"] and "colour" in errors["c"]
    with refuses("conflict", "gamma_w", InputError):
        run(tiny_pipe, items, Job(tmp_path, settings=SETTINGS.replace(gamma_w=0.5)))


def test_rows_of_before_keep_their_clips():
    """A setting at a call's default is as one that is not set, and "rewrite" is the row's own."""
    row = {"prompt": "a", "plan": "large", "identity": "x", "options": {"shift": "3.0"}}
    before = {"rewrite": "off", "rewrite_timeout": "60.0", "shift": "3.0"}
    assert same_clip({**row, "plan": "large steps=4", "options": before}, row)
    for other in ({"shift": "4.0"}, {**before, "rewrite_timeout": "9.0"}, {}, None):
        assert not same_clip({**row, "options": other}, row)


def test_lists_are_split_at_line_feeds_alone(tmp_path):
    odd = "a star\u2028moves\u0085left\u000bright\u001cup"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n" + json.dumps({"prompt": "b"}),
        "utf-8",
    )
    assert [i.prompt for i in read_prompts(tmp_path / "a.jsonl")] == [odd, "b"]
    (tmp_path / "a.txt").write_text(f"{odd}\r\n\nb\n", "utf-8")
    assert [i.prompt for i in read_prompts(tmp_path / "a.txt")] == [odd, "b"]


def test_a_fresh_seed_of_a_batch_stays_with_its_clip(tiny_pipe, tmp_path):
    items = [Item("a", PROMPTS[0]), Item("b", PROMPTS[1], seed=-1)]
    job = Job(tmp_path, seed=-1, suffix=".png", settings=SETTINGS)
    assert run(tiny_pipe, items, job)["made"] == 2
    seeds = {i: r["settings"]["seed"] for i, r in finished(tmp_path)[0].items()}
    assert len(set(seeds.values())) == 2 and min(seeds.values()) >= 0
    assert run(tiny_pipe, items, job)["kept"] == 2
    (tmp_path / "a.png").unlink()
    run(tiny_pipe, items, job)
    assert {i: r["settings"]["seed"] for i, r in finished(tmp_path)[0].items()} == seeds


def test_what_makes_a_clip_is_in_its_settings_and_its_path_is_not(
    tiny_pair, tiny_pipe, tmp_path, monkeypatch
):
    from nexus_rt import NexusPipeline

    job, items = (
        Job(tmp_path, suffix=".png", settings=SETTINGS, models="pair=one"),
        [Item("a", PROMPTS[0])],
    )
    assert run(tiny_pipe, items, job)["made"] == 1
    other = Job(tmp_path, suffix=".png", settings=SETTINGS, models="pair=./one/../one")
    assert run(tiny_pipe, items, other)["kept"] == 1  # the same weights, written differently

    def quiet(**options):
        pipe = NexusPipeline.from_pretrained(tiny_pair, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    for options in (
        dict(torch_dtype=torch.bfloat16),
        dict(attention="math"),
        dict(kernels="torch"),
    ):
        assert run(quiet(**options), items, job)["made"] == 1, options
    again = shutil.copytree(tiny_pair, tmp_path / "copy")
    assert NexusPipeline.from_pretrained(again).identity == tiny_pipe.identity
    file = again / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert NexusPipeline.from_pretrained(again).identity["vae"] != tiny_pipe.identity["vae"]


def test_a_clip_is_kept_by_what_its_plan_does(tiny_pipe, tmp_path):
    """Plans that differ in a step make it again, whatever they are called; another text of the same
    steps keeps it."""
    items = [Item("a", PROMPTS[0])]
    size = dict(height=32, width=48, num_frames=1, num_inference_steps=4)

    def made(plan, **options):
        settings = CallSettings(**{**size, "plan": plan, **options})
        job = Job(tmp_path, suffix=".png", settings=settings)
        return run(tiny_pipe, items, job)["made"]

    assert made("handoff=0.5") == 1 and made("handoff=0.5") == 0
    assert made("small:2 bridge:1 large:1") == 0
    for plan in (
        "handoff=0.5,bridge=0",
        "handoff=sigma:0.95,bridge=0",
        "auto=0.1",
        "auto=0.3",
        "auto=0.3 gamma-w=0.3000001",
        "auto=0.3 energy=none",
        "large:4@3",
        "large:4@3.0000001",
        "large:4/adaptive=0.0500001",
        "large:4/adaptive=0.05",
        "large:4/solver=euler",
        "small:1/4 large:3/shift=3.001",
        "small:1/4 large:3/shift=3",
    ):
        options = {"num_inference_steps": None} if "/4" in plan else {}
        assert (made(plan, **options), made(plan, **options)) == (1, 0), plan
    row = finished(tmp_path)[0]["a"]["settings"]
    assert row["plan"] == "small:1/4 large:3/shift=3 shift=5"
    walked = tiny_pipe.make_plan(row["plan"])
    assert walked.identity == row["identity"] and walked.text == row["plan"]


def test_what_a_pair_sets_for_its_calls_makes_a_clip_again(tiny_pipe, tmp_path, monkeypatch):
    job, items = Job(tmp_path, suffix=".png", settings=SETTINGS), [Item("a", PROMPTS[0])]
    assert run(tiny_pipe, items, job)["made"] == 1
    for change in (
        dict(guidance_scale=4.5),
        dict(guidance_scale_2=2.5),
        dict(shift=4.0),
        dict(large_solver="euler"),
        dict(small_shift=7.0, large_shift=7.0),
    ):
        monkeypatch.setattr(tiny_pipe, "defaults", tiny_pipe.defaults.replace(**change))
        again = run(tiny_pipe, items, job)["made"]
        assert again == ("small_shift" not in change), change  # of clocks, which QUICK has none of
        assert run(tiny_pipe, items, job)["kept"] == 1


def test_a_clips_metadata_has_the_exact_plan(tiny_pipe, tmp_path):
    plan = "small:2@3.0000001[0:1] bridge:1 large:1/solver=euler"
    options = {**QUICK, "num_inference_steps": 4, "plan": plan, "shift": 3.25, "energy": "none"}
    assert (
        run(tiny_pipe, [Item("a", PROMPTS[0])], Job(tmp_path, settings=CallSettings(**options)))[
            "made"
        ]
        == 1
    )
    text = read_metadata(tmp_path / "a.mp4")["plan"]
    assert text.startswith("small:2@3.0000001[0:1] bridge:1 large:1/solver=euler energy=none")
    assert text.endswith(" steps=4 shift=3.25")
    frames = lambda **call: (
        tiny_pipe(
            PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **call
        ).frames
    )
    size = {k: QUICK[k] for k in ("height", "width", "num_frames")}
    assert torch.equal(frames(**options), frames(plan=text, **size))


def test_clips_that_are_none_are_made_again(tiny_pipe, tmp_path):
    job, items = Job(tmp_path, settings=SETTINGS), [Item(n, PROMPTS[0]) for n in "abc"]
    run(tiny_pipe, items, job)
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes()[:40])
    (tmp_path / f".c.{kernel()}-0a.part.mp4").write_bytes(b"x")  # what a killed process left
    assert run(tiny_pipe, items, job) == {"made": 2, "kept": 1, "failed": 0}
    assert not list(tmp_path.glob(".*.part*"))


def test_names_of_a_text_list_stay_as_it_grows(tmp_path):
    names = []
    for count in (3, 20_000):
        (tmp_path / "a.txt").write_text("\n".join(f"prompt {i}" for i in range(count)))
        names.append([i.id for i in read_prompts(tmp_path / "a.txt")][:3])
    assert names[0] == names[1] == ["0000", "0001", "0002"]


def test_latents_are_kept_where_a_clip_cannot_be_written(tiny_pipe, tmp_path, monkeypatch):
    from nexus_rt.media.latents import read_latents

    monkeypatch.setattr(
        batch_clips,
        "save_video",
        lambda *a, **k: (_ for _ in ()).throw(InputError("no space left")),
    )
    assert run(tiny_pipe, [Item("a", PROMPTS[0])], Job(tmp_path, settings=SETTINGS))["failed"] == 1
    row = finished(tmp_path)[0]["a"]
    assert "The latents are saved in" in row["error"]
    assert read_latents(next(tmp_path.glob("*.safetensors"))).isfinite().all()


NO_TEXT = {
    "prompt": {"prompt": "a \ud800 circle"},
    "negative": {"prompt": PROMPTS[0], "negative": "\udfff"},
    "rewrite": {"prompt": PROMPTS[0], "rewrite": "\udc00\ud800"},
    "too long": {"prompt": "x" * 100_001},
}


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_an_item_that_is_no_text_fails_alone(tiny_pair, tmp_path, kind, capsys):
    rows = [{"id": "a", "prompt": PROMPTS[0]}]
    rows += [{"id": f"bad{i}", **row} for i, row in enumerate(NO_TEXT.values())]
    rows += [{"id": "z", "prompt": PROMPTS[1]}]
    content = json.dumps(rows) if kind == ".json" else "\n".join(map(json.dumps, rows))
    path, out = written(tmp_path, f"p{kind}", content), tmp_path / "out"
    quick = ["--size", "48x32", "--frames", "5", "--steps", "2", "--plan", "small:1 large:1"]
    line = ["batch", str(path), "-o", str(out), "--pair", str(tiny_pair), *quick]
    assert main(line) == 1 and "2 made, 0 kept, 4 failed" in capsys.readouterr().out
    ended = finished(out)[0]
    assert {n: r["status"] for n, r in ended.items()} == {
        "a": "done",
        "z": "done",
        **{f"bad{i}": "failed" for i in range(4)},
    }
    assert "half a surrogate pair" in ended["bad0"]["error"]
    assert "negative_prompt" in ended["bad1"]["error"] and "rewrite" in ended["bad2"]["error"]
    (out / "results.jsonl").read_bytes().decode()  # UTF-8, whole
    assert main(line) == 1 and "0 made, 2 kept, 4 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "item",
    [Item("a", 5), Item("a", None), Item("a", "x", seed=10**30), Item("a", "x", negative=7)],
    ids=range(4),
)
def test_an_item_of_python_that_no_call_takes_fails_alone(tiny_pipe, tmp_path, item):
    items = [item, Item("b", PROMPTS[0])]
    assert run(tiny_pipe, items, Job(tmp_path, settings=SETTINGS)) == {
        "made": 1,
        "kept": 0,
        "failed": 1,
    }
    with refuses("invalid_value", "id", InputError):
        run(tiny_pipe, [Item("../b", PROMPTS[0])], Job(tmp_path / "out", settings=SETTINGS))
    assert not (tmp_path / "b2.mp4").exists()


def test_a_name_that_is_no_text_is_refused_with_its_place(tmp_path):
    for row in ({"id": "\ud800", "prompt": "x"}, {"prompt": "x", "\udc00": 1}, {"size": "\ud800"}):
        with pytest.raises(InputError, match=r"p.json: \[0\]") as caught:
            read_prompts(written(tmp_path, "p.json", [row]))
        str(caught.value).encode()


@pytest.mark.parametrize("name, index", [("prompt", 1), ("negative_prompt", 2)])
def test_a_call_names_the_prompt_that_is_no_text(tiny_pipe, name, index):
    texts = ["a", "b", "c"]
    texts[index] = "\ud83d"
    inputs = {"prompt": ["a", "b", "c"], name: texts}
    for call in (tiny_pipe, tiny_pipe.encode_prompt):
        with pytest.raises(InputError, match=rf"{name}\[{index}\] is .* half a surrogate pair"):
            call(**inputs)


BROKEN_LINES = [
    b'{"id": "a\\ud800", "status": "done", "when": 1, "settings": {"x": 1}}',
    b'{"id": "a", "status": "done", "when": 1e999, "settings": {"x": 1}}',
    b'{"id": "a", "status": "done", "when": NaN, "settings": {"x": 1}}',
    b'{"id": "a", "status": "done", "when": 1, "settings": {"prompt": "\\udc00"}}',
    b'{"id": "a", "status": "done", "when": %s, "settings": {"x": 1}}' % (b"9" * 400),
    b'{"id": ["a"], "status": "done", "when": 1, "settings": {"x": 1}}',
    b'{"id": "a", "status": "done", "when": 1, "settings": []}',
    b'{"id": "a", "status": "begun"',
    b"\xff\xfe\x00\x00",
    b"[" * 100_000,
    b"null",
    b'"\\ud800"',
    b"\x00" * 50,
    b'{"id": "a", "id": "b"}',
]


def test_lines_that_are_none_count_for_nothing(tiny_pipe, tmp_path):
    job, items = Job(tmp_path, settings=SETTINGS), [Item("a", PROMPTS[0]), Item("b", PROMPTS[1])]
    assert run(tiny_pipe, items, job)["made"] == 2
    good = job.results.read_bytes().splitlines()
    mixed = [line for pair in zip(BROKEN_LINES, good * 7, strict=True) for line in pair]
    job.results.write_bytes(b"\n".join(mixed) + b"\nhalf a li")
    (tmp_path / "results.other.jsonl").write_bytes(b"\n".join(BROKEN_LINES))
    assert run(tiny_pipe, items, job) == {"made": 0, "kept": 2, "failed": 0}
    assert job.results.read_bytes().endswith(b"half a li\n")  # a line of its own for the next row


@pytest.mark.parametrize("seed", [-5, 2**64, 10**30, True, "7", None, 0.5])
def test_a_kept_seed_that_no_generator_takes_is_drawn_again(tiny_pipe, tmp_path, seed):
    row = {"id": "a", "status": "done", "when": 1.0, "settings": {"seed": seed}}
    written(tmp_path, "results.jsonl", json.dumps(row) + "\n")
    job = Job(tmp_path, seed=-1, settings=SETTINGS)
    assert run(tiny_pipe, [Item("a", PROMPTS[0])], job)["made"] == 1
    assert 0 <= finished(tmp_path)[0]["a"]["settings"]["seed"] < 2**64


def test_results_that_cannot_be_read_or_written_are_our_error(tiny_pipe, tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with refuses("unreadable", kind=InputError):
        run(tiny_pipe, [Item("a", PROMPTS[0])], Job(tmp_path, settings=SETTINGS))
    with refuses("not_writable", kind=NexusError):
        Lines(tmp_path / "none" / "results.jsonl").add({"id": "a"})


@pytest.mark.parametrize("text", ["", "1", "1/", "a/b", "1/2/3", "0x1/2", "\u0661/\u0662", "1/1_0"])
def test_a_shard_is_two_numbers(text):
    with refuses("unreadable", "shard", InputError):
        parse_shard(text)
    with refuses("unreadable", "shard", InputError):
        parse_shard("1/" + "9" * 400)
