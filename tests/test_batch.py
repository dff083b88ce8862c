"""Prompt lists and batches: every item has a clip or a reason, nothing is made twice, and nothing
half-made has a name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from nexus_rt import InputError, batch
from nexus_rt.batch import Job, run
from nexus_rt.cli import main
from nexus_rt.part_files import kernel
from nexus_rt.prompts import Item, read_prompts
from nexus_rt.size import ClipSize

PROMPTS = ["a red circle", "a blue square moves left", "the panda"]
QUICK = dict(height=32, width=48, num_frames=5, num_inference_steps=2, plan="small:1 large:1")


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_kind_of_list(tmp_path):
    text = written(tmp_path, "a.txt", "# shapes\na red circle\n\n  a blue square \n")
    assert read_prompts(text) == [Item("0000", "a red circle"), Item("0001", "a blue square")]
    rows = [{"prompt": "x", "id": 7, "seed": 3, "size": "64x32", "frames": 9, "negative": "y"}, "z"]
    wanted = [Item("7", "x", 3, (64, 32), 9, "y"), Item("0001", "z")]
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


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", "{", "a.json is not JSON"),
        ("a.jsonl", '"x"\n{', "line 2 is not JSON"),
        ("a.json", 3, "holds a int; expected an array of prompts"),
        ("a.json", [], "holds no prompts"),
        ("a.txt", "# nothing\n", "holds no prompts"),
        ("a.csv", "x", "ends in .csv; expected .txt, .json or .jsonl"),
        ("a.json", [{"id": "a"}], r"\[0\].prompt is None; expected text"),
        ("a.json", [{"prompt": "x", "seed": "1"}], r"\[0\].seed is '1'; expected a whole number"),
        ("a.json", [{"prompt": "x", "seed": True}], r"\[0\].seed is True"),
        ("a.json", [{"prompt": "x", "size": "big"}], r"\[0\].size is 'big'; expected WIDTHxHEIGHT"),
        ("a.json", [{"prompt": "x", "colour": 1}], "sets an unknown 'colour'"),
        ("a.json", [{"prompt": "x", "id": "../../x"}], "id is '../../x'; expected a file's name"),
        (
            "a.json",
            [{"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"}],
            "id 'a' is there twice",
        ),
        ("a.json", {"DRF": {"prompts": {}}}, "DRF.prompts is dict; expected an array"),
        (
            "a.json",
            {"DRF": {"prompts": [{"id": "x"}]}},
            r"DRF.prompts\[0\].prompt_en is None; expected text",
        ),
    ],
)
def test_a_list_that_breaks_its_form_says_where(name, content, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_prompts(written(tmp_path, name, content))


def test_no_list_and_no_shard(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="holds no .json files"):
        read_prompts(tmp_path)
    for text in ("0/2", "3/2", "x", "1"):
        with pytest.raises(InputError, match="shard"):
            Job(tmp_path, shard=batch.parse_shard(text))


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
        Item("c", PROMPTS[2], size=(32, 32), frames=1),
    ]
    job = Job(tmp_path / "out", seed=2, suffix=".png", options=QUICK)
    assert run(tiny_pipe, items, job) == {"made": 3, "kept": 0, "failed": 0}
    assert [r["id"] for r in rows(job.folder)] == ["a", "b", "c"] and {
        r["status"] for r in rows(job.folder)
    } == {"done"}
    assert {p.name for p in job.folder.glob("*.png")} == {"a.png", "b.png", "c.png"}
    from nexus_rt.video import save_video

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
        Job(tmp_path, suffix=".png", options=QUICK),
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
        run(tiny_pipe, changed, Job(tmp_path, suffix=".png", options={**QUICK, "plan": "large"}))[
            "made"
        ]
        == 3
    )


def test_shards_share_the_list_and_know_of_each_other(tiny_pipe, tmp_path):
    items = [Item(str(i), "a red circle", seed=i) for i in range(5)]
    made = [
        run(tiny_pipe, items, Job(tmp_path, suffix=".png", shard=(i, 2), options=QUICK))["made"]
        for i in (1, 2)
    ]
    assert made == [3, 2] and sorted(r["id"] for r in rows(tmp_path)) == list("01234")
    assert run(tiny_pipe, items, Job(tmp_path, suffix=".png", options=QUICK)) == {
        "made": 0,
        "kept": 5,
        "failed": 0,
    }


def test_a_failure_is_recorded_and_the_rest_goes_on(tiny_pipe, tmp_path, monkeypatch):
    items = [
        Item("a", PROMPTS[0]),
        Item("bad", PROMPTS[1], size=(50, 32)),
        Item("worse", PROMPTS[2]),
        Item("d", PROMPTS[0]),
    ]
    right, calls = batch.save_video, []

    def save(frames, path, *rest, **options):
        calls.append(path.stem)
        if path.stem == "worse" and calls.count("worse") == 1:
            raise OSError(28, "No space left on device")
        return right(frames, path, *rest, **options)

    monkeypatch.setattr(batch, "save_video", save)
    job = Job(tmp_path, suffix=".png", options=QUICK)
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
    monkeypatch.setattr(batch, "decodes_beside", lambda pipe, said: beside)
    events, decode, denoise = [], tiny_pipe.decode, batch._denoise

    def slow(latents, output_type, **options):
        if output_type != "latent":
            time.sleep(0.3)
            events.append("decoded")
        return decode(latents, output_type, **options)

    def watched(*args):
        events.append("denoised")
        return denoise(*args)

    monkeypatch.setattr(tiny_pipe, "decode", slow)
    monkeypatch.setattr(batch, "_denoise", watched)
    run(tiny_pipe, [Item("a", "a"), Item("b", "b")], Job(tmp_path, suffix=".png", options=QUICK))
    assert events == (
        ["denoised", "denoised", "decoded", "decoded"] if beside else ["denoised", "decoded"] * 2
    )


def test_where_there_is_room(tiny_pipe, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for threads, wanted in ((1, True), (2, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert batch.decodes_beside(tiny_pipe, {}) == wanted
    need = tiny_pipe.vae.working_bytes(ClipSize(48, 32, 5))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60)
    monkeypatch.setitem(vars(tiny_pipe), "device", torch.device("cuda"))
    # what PyTorch holds and does not use is free too
    for free, wanted in (
        (need - 40, True),
        (need - 41, False),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, n=free: (n, 10**12))
        assert batch.decodes_beside(tiny_pipe, {"size": "48x32", "frames": 5}) == wanted
    monkeypatch.setattr(tiny_pipe, "vram", 10**9)  # a budget was planned for one thing at a time
    assert not batch.decodes_beside(tiny_pipe, {})


def test_a_full_disk_is_one_sentence(tiny_pipe, tmp_path, monkeypatch, capsys):
    def full(self, row):
        raise batch.NexusError(f"{self.path} cannot be written (No space left on device)")

    lines = batch.Lines(tmp_path / "r" / "results.jsonl")
    with pytest.raises(batch.NexusError, match="cannot be written .* what was finished is kept"):
        lines.add({"id": "a"})  # its folder is gone
    monkeypatch.setattr(batch.Lines, "add", full)
    with pytest.raises(batch.NexusError, match="No space left"):
        run(
            tiny_pipe, [Item("a", "a"), Item("b", "b")], Job(tmp_path, suffix=".png", options=QUICK)
        )


def test_a_prompt_that_cannot_be_encoded_fails_alone(tiny_pipe, tmp_path, monkeypatch):
    right = tiny_pipe.encode_prompt

    def encode(prompts, *rest):
        if "bad" in prompts:
            raise InputError("the prompt is too long")
        return right(prompts, *rest)

    monkeypatch.setattr(tiny_pipe, "encode_prompt", encode)
    items = [Item("a", PROMPTS[0]), Item("b", "bad"), Item("c", PROMPTS[1])]
    assert run(tiny_pipe, items, Job(tmp_path, suffix=".png", options=QUICK)) == {
        "made": 2,
        "kept": 0,
        "failed": 1,
    }


def test_two_processes_do_not_share_a_shard(tiny_pipe, tmp_path):
    job = Job(tmp_path, options=QUICK)
    with (
        batch.open_folder(job),
        pytest.raises(InputError, match="another process works on results.jsonl"),
    ):
        run(tiny_pipe, [Item("a", "a")], job)


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


def test_prompts_are_read_together(tiny_pipe, tmp_path, monkeypatch):
    """One call for eight prompts, whatever their lengths; what they say does not depend on their
    neighbours."""
    right, calls = tiny_pipe.encode_prompt, []

    def encode(prompts, *rest):
        calls.append(len(prompts))
        return right(prompts, *rest)

    monkeypatch.setattr(tiny_pipe, "encode_prompt", encode)
    part = [(Item(str(i), " ".join(["red"] * (1 + 3 * i))), {"frames": 5}) for i in range(9)]
    told = batch._encoded(tiny_pipe, part, Job(tmp_path))
    alone = batch._encoded(tiny_pipe, part[2:3], Job(tmp_path))
    assert calls == [9, 1] and torch.allclose(
        told[2]["prompt_embeds"], alone[0]["prompt_embeds"], atol=1e-5
    )
    calls.clear()
    run(
        tiny_pipe,
        [Item(str(i), "a") for i in range(9)],
        Job(tmp_path, suffix=".png", options=QUICK),
    )
    assert calls == [8, 1]


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
    job = Job(tmp_path, seed=-1, suffix=".png", options=QUICK)
    assert run(tiny_pipe, items, job)["made"] == 2
    seeds = {i: r["settings"]["seed"] for i, r in batch.finished(tmp_path)[0].items()}
    assert len(set(seeds.values())) == 2 and min(seeds.values()) >= 0
    assert run(tiny_pipe, items, job)["kept"] == 2
    (tmp_path / "a.png").unlink()
    run(tiny_pipe, items, job)
    assert {i: r["settings"]["seed"] for i, r in batch.finished(tmp_path)[0].items()} == seeds


def test_what_makes_a_clip_is_in_its_settings_and_its_path_is_not(
    tiny_pair, tiny_pipe, tmp_path, monkeypatch
):
    from nexus_rt import NexusPipeline

    job, items = (
        Job(tmp_path, suffix=".png", options=QUICK, models="pair=one"),
        [Item("a", PROMPTS[0])],
    )
    assert run(tiny_pipe, items, job)["made"] == 1
    other = Job(tmp_path, suffix=".png", options=QUICK, models="pair=./one/../one")
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
        job = Job(tmp_path, suffix=".png", options={**size, "plan": plan, **options})
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
    row = batch.finished(tmp_path)[0]["a"]["settings"]
    assert row["plan"] == "small:1/4 large:3/shift=3 shift=5"
    walked = tiny_pipe.make_plan(row["plan"])
    assert walked.identity == row["identity"] and walked.text == row["plan"]


def test_what_a_pair_sets_for_its_calls_makes_a_clip_again(tiny_pipe, tmp_path, monkeypatch):
    from dataclasses import replace

    job, items = Job(tmp_path, suffix=".png", options=QUICK), [Item("a", PROMPTS[0])]
    assert run(tiny_pipe, items, job)["made"] == 1
    for change in (
        dict(guidance_scale=4.5),
        dict(guidance_scale_2=2.5),
        dict(shift=4.0),
        dict(large_solver="euler"),
        dict(small_shift=7.0, large_shift=7.0),
    ):
        monkeypatch.setattr(tiny_pipe, "defaults", replace(tiny_pipe.defaults, **change))
        again = run(tiny_pipe, items, job)["made"]
        assert again == ("small_shift" not in change), change  # of clocks, which QUICK has none of
        assert run(tiny_pipe, items, job)["kept"] == 1


def test_a_clips_metadata_has_the_exact_plan(tiny_pipe, tmp_path):
    from nexus_rt.video import read_metadata

    plan = "small:2@3.0000001[0:1] bridge:1 large:1/solver=euler"
    options = {**QUICK, "num_inference_steps": 4, "plan": plan, "shift": 3.25, "energy": "none"}
    assert run(tiny_pipe, [Item("a", PROMPTS[0])], Job(tmp_path, options=options))["made"] == 1
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
    job, items = Job(tmp_path, options=QUICK), [Item(n, PROMPTS[0]) for n in "abc"]
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
    from nexus_rt.models.vae import read_latents

    monkeypatch.setattr(
        batch, "save_video", lambda *a, **k: (_ for _ in ()).throw(InputError("no space left"))
    )
    assert run(tiny_pipe, [Item("a", PROMPTS[0])], Job(tmp_path, options=QUICK))["failed"] == 1
    row = batch.finished(tmp_path)[0]["a"]
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
    ended = batch.finished(out)[0]
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
    assert run(tiny_pipe, items, Job(tmp_path, options=QUICK)) == {
        "made": 1,
        "kept": 0,
        "failed": 1,
    }
    with pytest.raises(InputError, match="expected a file's name"):
        run(tiny_pipe, [Item("../b", PROMPTS[0])], Job(tmp_path / "out", options=QUICK))
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
    job, items = Job(tmp_path, options=QUICK), [Item("a", PROMPTS[0]), Item("b", PROMPTS[1])]
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
    job = Job(tmp_path, seed=-1, options=QUICK)
    assert run(tiny_pipe, [Item("a", PROMPTS[0])], job)["made"] == 1
    assert 0 <= batch.finished(tmp_path)[0]["a"]["settings"]["seed"] < 2**64


def test_results_that_cannot_be_read_or_written_are_our_error(tiny_pipe, tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(InputError, match="results.jsonl cannot be read"):
        run(tiny_pipe, [Item("a", PROMPTS[0])], Job(tmp_path, options=QUICK))
    with pytest.raises(batch.NexusError, match="cannot be written"):
        batch.Lines(tmp_path / "none" / "results.jsonl").add({"id": "a"})


@pytest.mark.parametrize("text", ["", "1", "1/", "a/b", "1/2/3", "0x1/2", "\u0661/\u0662", "1/1_0"])
def test_a_shard_is_two_numbers(text):
    with pytest.raises(InputError, match="is not I/N"):
        batch.parse_shard(text)
    with pytest.raises(InputError, match="is not I/N"):
        batch.parse_shard("1/" + "9" * 400)
