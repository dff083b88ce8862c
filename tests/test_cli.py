"""The command line, in process where that is enough and as a process where it is not."""

import argparse
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from PIL import Image

from nexus_rt import InputError, ModelError, NexusPipeline, cli
from nexus_rt.cli import main
from nexus_rt.cli.options import check_options
from tests.refusals import refuses

PROMPT = "a red circle moves left"


def pair(tiny_pair, *more):
    return ["--pair", str(tiny_pair), *map(str, more)]


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_generate_writes_the_file(tiny_pair, tmp_path, capsys, suffix):
    out = tmp_path / f"clip.{suffix}"
    assert main(["generate", PROMPT, *pair(tiny_pair, "-o", out)]) == 0
    assert out.stat().st_size > 500 and os.listdir(tmp_path) == [out.name]
    assert "5 frames of 48x32" in capsys.readouterr().out


def test_options_reach_the_pipeline(tiny_pair, tmp_path):
    """The same options give the same picture, each changed option another."""
    base = dict(
        size="32x48",
        frames="9",
        steps="5",
        guidance="3",
        shift="3",
        seed="2",
        plan="small:1 bridge:2 large:2@1",
        split="dct",
        lowpass="butterworth",
        energy="none",
        solver="euler",
        negative="blue square",
        dtype="float32",
        device="cpu",
    )

    # energy and split act in the two bridge steps
    def run(**change):
        out = tmp_path / "x.png"
        options = [
            w for k, v in {**base, **change}.items() for w in (f"--{k.replace('_', '-')}", v)
        ]
        assert main(["generate", PROMPT, *pair(tiny_pair, "-o", out, "--quiet", *options)]) == 0
        with Image.open(out) as image:
            return image.size, image.tobytes()

    first = run()
    assert first == run() and first[0] == (8 * 32, 2 * 48)
    for change in (
        dict(steps="6", plan="small:1 bridge:2 large:3@1"),
        dict(guidance="6"),
        dict(shift="5"),
        dict(seed="3"),
        dict(plan="large"),
        dict(split="gaussian"),
        dict(lowpass="ideal"),
        dict(energy="progressive"),
        dict(solver="unipc"),
        dict(negative="panda"),
        dict(guidance_2="9", plan="small:1 bridge:2 large:2"),
    ):
        assert run(**change) != first, change


def execute(words):
    """A command line's checks and its command, whose errors are not caught."""
    words = [str(word) for word in words]
    known = cli.parser()
    args = known.parse_args(words)
    check_options(known, words, args)
    return cli.COMMANDS[args.command].run(args)


@pytest.mark.parametrize(
    "options, code, param",
    [
        (["--size", "40x32"], "invalid_value", "width"),
        (["--frames", "6"], "invalid_value", "num_frames"),
        (["--steps", "0"], "out_of_range", "num_inference_steps"),
        (["--steps", "-2"], "out_of_range", "num_inference_steps"),
        (["--plan", "handoff=1200"], "out_of_range", "plan"),
        (["--energy", "reference", "--plan", "handoff=0.5"], "conflict", "energy"),
        (["--device", "cdua"], "not_found", "device"),
        (["--fps", "0"], "out_of_range", "--fps"),
        (["--guidance", "1,2"], "unsupported", "guidance_scale"),
        (["--rewriter", "nowhere", "--rewriter-model", "m"], "conflict", "--rewriter-model"),
        (["--rewriter", "http://x/v1"], "missing", "--rewriter-model"),
        (["--rewrite", " "], "missing", "rewrite"),
        (["-o", "nowhere/out.mp4"], "not_found", "path"),
        (["-o", "out.avi"], "unknown_name", "output suffix"),
    ],
)
def test_wrong_arguments_are_refused_and_write_nothing(
    tiny_pair, tmp_path, monkeypatch, options, code, param
):
    monkeypatch.chdir(tmp_path)
    with refuses(code, param, InputError):
        execute(["generate", PROMPT, *pair(tiny_pair), *options])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "option, word, near",
    [
        ("--plan", "refrence", "reference"),
        ("--split", "gausian", "gaussian"),
        ("--lowpass", "idel", "ideal"),
        ("--solver", "eulr", "euler"),
        ("--energy", "progresive", "progressive"),
        ("--backend", "trch", "torch"),
    ],
)
def test_an_unknown_name_ends_with_2_and_the_nearest(
    tiny_pair, tmp_path, monkeypatch, capsys, option, word, near
):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, *pair(tiny_pair, option, word)]) == 2
    err = capsys.readouterr().err
    assert f"unknown {option[2:]} {word!r}" in err and f"did you mean {near!r}" in err
    assert os.listdir(tmp_path) == []


def test_an_empty_prompt(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses("missing", "prompt", InputError):
        execute(["generate", "  ", *pair(tiny_pair)])


def test_a_model_that_cannot_be_read_exits_1(own_pair, tmp_path, capsys):
    path = own_pair / "large" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert main(["generate", PROMPT, *pair(own_pair, "-o", tmp_path / "a.mp4")]) == 1
    assert path.name in capsys.readouterr().err and not (tmp_path / "a.mp4").exists()


def test_the_output_is_checked_before_the_model_is_read(tmp_path):
    none = ["--pair", tmp_path / "none"]
    with refuses("not_found", "path", InputError):
        execute(["generate", PROMPT, *none, "-o", tmp_path / "no" / "a.mp4"])


def test_latents_of_a_failed_decoding_can_be_decoded_later(
    tiny_pair, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as broken:
        broken.setattr(
            "nexus_rt.components.vae.decode_whole",
            lambda *a, **k: (_ for _ in ()).throw(MemoryError("no memory")),
        )
        assert main(["generate", PROMPT, *pair(tiny_pair, "-o", tmp_path / "a.png")]) == 1
    saved = re.search(r"\S+\.safetensors", capsys.readouterr().err)[0]
    assert os.path.dirname(saved) == str(tmp_path) and not (tmp_path / "a.png").exists()
    assert main(["decode", saved, *pair(tiny_pair, "-o", tmp_path / "late.png")]) == 0
    assert main(["generate", PROMPT, *pair(tiny_pair, "-o", tmp_path / "a.png")]) == 0
    assert (tmp_path / "late.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("split, heading", [("gaussian", "sigma"), ("fft", "cutoff")])
def test_plan_prints_the_table_and_the_totals(tiny_pair, capsys, split, heading):
    spec = "small:2 bridge:1 large:3@1"
    assert (
        main(["plan", *pair(tiny_pair, "--plan", spec, "--split", split, "--costs", "10,100")]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert heading in lines[0] and "timestep" in lines[0]
    rows = [line.split() for line in lines[1:7]]
    assert [r[0] for r in rows] == list("012345") and [r[4] for r in rows] == ["small"] * 2 + [
        "both"
    ] + ["large"] * 3
    # 10 a guided small step; the large one is unguided (50) in its segment and in the bridge beside
    # it
    assert [float(r[6]) for r in rows] == [10, 10, 60, 50, 50, 50]
    assert (
        "6 small and 4 large forwards, 230.0 ms" in lines[7]
        and "660.0 ms" in lines[8]
        and "35%" in lines[8]
    )


def test_plan_measures_the_pair_it_is_given(tiny_pair, capsys):
    assert main(["plan", *pair(tiny_pair, "--plan", "reference")]) == 0
    out = capsys.readouterr().out
    small, large = (
        float(re.search(rf"{n} (\d+\.\d+) ms guided", out)[1]) for n in ("small", "large")
    )
    total = float(re.search(r"reference: 12 small and 12 large forwards, (\d+\.\d) ms\n", out)[1])
    assert (
        small > 0
        and large > 0
        and abs(total - 6 * (small + large)) <= 0.5 * total
        and "measured on this machine" in out
    )


def test_plan_without_models(capsys):
    assert main(["plan", "--plan", "handoff=0.3", "--costs", "750,4600"]) == 0
    out = capsys.readouterr().out
    assert "handoff=0.3,bridge=5: 40 small and 70 large forwards, 176000.0 ms" in out
    with refuses("invalid_value", "--costs", InputError):
        execute(["plan", "--costs", "x"])


def test_doctor_names_versions_devices_and_reasons(capsys):
    from importlib.metadata import version

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert (
        version("torch") in out
        and "cpu" in out
        and re.search(r"(yes|no) +triton kernels +\S+", out)
    )


def test_help_is_enough(capsys):
    for command in ("generate", "plan", "decode", "doctor"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--small",
        "--large",
        "--size",
        "--frames",
        "--steps",
        "--guidance",
        "--shift",
        "--seed",
        "--plan",
        "--split",
        "--energy",
        "--dtype",
        "--device",
        "--output",
    ):
        assert option in text


@pytest.mark.process
def test_an_interrupt_leaves_no_file_and_exits_130(tiny_pair, tmp_path):
    """A real process on a terminal, and a real signal in the middle of the loop."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    terminal, inside = os.openpty()
    # a bar is drawn to the width there is
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nexus_rt.cli",
            "generate",
            PROMPT,
            *pair(tiny_pair, "--steps", 20000, "-o", tmp_path / "a.mp4"),
        ],
        stderr=inside,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    os.close(inside)
    seen, deadline = "", time.time() + 120

    def read_until(pattern):
        nonlocal seen
        while not re.search(pattern, seen):
            assert time.time() < deadline, seen[-500:]
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")

    try:
        read_until(r" [1-9]\d*/20000")  # the progress bar has counted a step
        process.send_signal(signal.SIGINT)
        read_until("interrupted; nothing was written")
        assert process.wait(30) == 130
    finally:
        process.kill()
        os.close(terminal)
    assert os.listdir(tmp_path) == []


def test_a_config_that_lies_about_its_defaults_is_an_error(own_pair, capsys):
    index = json.loads((own_pair / "model_index.json").read_text())
    index["defaults"]["hieght"] = 3
    (own_pair / "model_index.json").write_text(json.dumps(index))
    assert main(["plan", *pair(own_pair)]) == 1
    assert "'hieght'" in capsys.readouterr().err


def test_a_fresh_seed_is_printed_and_makes_the_same_clip(tiny_pair, tmp_path, capsys):
    line = ["generate", PROMPT, *pair(tiny_pair, "--quiet", "-o")]
    assert main([*line, str(tmp_path / "a.mp4"), "--seed", "-1"]) == 0
    seed = re.search(r"seed (\d+)", capsys.readouterr().err)[1]
    assert main([*line, str(tmp_path / "b.mp4"), "--seed", seed]) == 0
    assert main([*line, str(tmp_path / "c.mp4"), "--seed", "-1"]) == 0
    a, b, c = ((tmp_path / f"{n}.mp4").read_bytes() for n in "abc")
    assert a == b != c
    from nexus_rt.media.reading import read_metadata

    made = read_metadata(tmp_path / "a.mp4")
    assert (
        made["prompt"] == PROMPT
        and made["seed"] == int(seed)
        and "torch" in made["versions"]
        and "handoff" in made["plan"]
    )


@pytest.mark.parametrize(
    "options, code, param",
    [
        (("--seed", 2**64), "out_of_range", "--seed"),
        (("--seed", -2), "out_of_range", "--seed"),
        (("--size", "0x16"), "out_of_range", "width"),
        (("--size", "16x1000000"), "out_of_range", "height"),
        (("--frames", 0), "out_of_range", "num_frames"),
        (("--frames", 10**9), "out_of_range", "num_frames"),
        (("--steps", 10**9), "out_of_range", "num_inference_steps"),
        (("--small-steps", 0), "out_of_range", "small_steps"),
        (("--shift", "1e30"), "out_of_range", "shift"),
        (("--guidance", "1e30"), "out_of_range", "guidance_scale"),
        (("--guidance-2", "1,1e30"), "out_of_range", "guidance_scale_2"),
        (("--rewrite-timeout", 0), "out_of_range", "rewrite_timeout"),
        (("--sigma-max", "1e30"), "out_of_range", "sigma_max"),
        (("--fps", "1/0"), "out_of_range", "--fps"),
        (("--gamma-hf", 2), "out_of_range", "gamma_hf"),
        (("--gamma-w", 0.5), "conflict", "gamma_w"),
        (("--sigma-min", 0.3, "--split", "fft"), "conflict", "--sigma-min"),
        (("--rho-max", 0.5), "conflict", "--rho-max"),
        (("--order", 3, "--split", "dct"), "conflict", "--order"),
        (("--plan", "handoff=0.3", "--as-published"), "conflict", "plan"),
        (("--timesteps", "1000,500", "--as-published"), "conflict", "as_published"),
        (("--sigma-min", 0.9, "--sigma-max", 0.5), "out_of_range", "sigma_min"),
    ],
)
def test_numbers_outside_their_range_are_refused_before_any_model(
    tiny_pair, tmp_path, options, code, param, unread
):
    with refuses(code, param, InputError):
        execute(["generate", PROMPT, *pair(tiny_pair, "-o", tmp_path / "x.mp4", *options)])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unread(monkeypatch):
    """No pipeline can be made."""
    for name in ("from_pretrained", "from_engines"):
        monkeypatch.setattr(
            NexusPipeline, name, lambda *args, **options: pytest.fail("a model was read")
        )


def test_the_blend_s_numbers_and_the_published_defaults_reach_the_call(
    tiny_pair, tmp_path, monkeypatch
):
    from nexus_rt import BlendConfig

    calls = []
    right = NexusPipeline.__call__
    monkeypatch.setattr(
        NexusPipeline, "__call__", lambda self, *a, **k: (calls.append(k), right(self, *a, **k))[1]
    )
    numbers = (
        "--gamma-w",
        0.5,
        "--gamma-hf",
        0.6,
        "--sigma-min",
        0.4,
        "--sigma-max",
        0.8,
        "--plan",
        "reference",
        "--steps",
        2,
    )
    assert main(["generate", PROMPT, *pair(tiny_pair, "-o", tmp_path / "x.png", *numbers)]) == 0
    assert (
        calls[0]["blend"] == BlendConfig(gamma_hf=0.6, sigma_min=0.4, sigma_max=0.8)
        and calls[0]["gamma_w"] == 0.5
    )
    assert (
        main(
            [
                "generate",
                PROMPT,
                *pair(tiny_pair, "-o", tmp_path / "y.png", "--as-published", "--steps", 2),
            ]
        )
        == 0
    )
    assert calls[1]["as_published"] is True and "plan" not in calls[1]
    assert main(["plan", *pair(tiny_pair, "--as-published", "--costs", "1,2")]) == 0


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.gguf", "model.ckpt"])
def test_a_single_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("the hub was asked")
    )
    (tmp_path / "models").mkdir()
    line = ["generate", PROMPT, "--small", f"models/{name}", "-o", "x.mp4"]
    with refuses("not_found", "source", ModelError):
        execute(line)
    (tmp_path / "models" / name).write_bytes(b"x")
    with refuses("damaged", kind=ModelError):
        execute(line)


PAIRS = [
    (("generate", "x", "--engines", "e"), option)
    for option in (
        ("--pair", "p"),
        ("--small", "s"),
        ("--large", "l"),
        ("--vae", "v"),
        ("--text-encoder", "t"),
        ("--understanding", "u"),
        ("--connector", "c"),
        ("--small-lora", "f"),
        ("--large-lora", "f"),
        ("--attention", "sdpa"),
        ("--attention", "auto"),
        ("--backend", "torch"),
    )
] + [
    (("generate", "x"), ("--force",)),
    (("decode", "l.safetensors"), ("--force",)),
    (("batch", "l.txt", "-o", "d"), ("--workers", "2")),
    (("plan", "--costs", "1,2"), ("--attention", "sdpa")),
    (("generate", "x", "--as-published"), ("--split", "fft")),
    (("generate", "x", "--as-published"), ("--energy", "none")),
    (("plan", "--costs", "1,2", "--as-published"), ("--lowpass", "ideal")),
    (("generate", "x", "--rewriter", "d"), ("--rewrite", "off")),
    (("batch", "l.txt", "-o", "d"), ("--rewriter-model", "m")),
    (("export", "-o", "d"), ("--sm", "89")),
    (("export", "-o", "d", "--backend", "aoti"), ("--opset", "20")),
    (("export", "-o", "d"), ("--weight-streaming",)),
    (("export", "-o", "d", "--backend", "aoti"), ("--refit",)),
    (("bench", "compare", "a.json", "b.json"), ("--runs", "3")),
    (("bench", "compare", "a.json", "b.json"), ("--json", "x.json")),
    (("bench", "--estimate", "never"), ("--tflops", "3")),
]


@pytest.mark.parametrize(
    "line, option", PAIRS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_options_that_do_not_go_together_are_refused_by_name(
    line, option, tmp_path, monkeypatch, unread, capsys
):
    monkeypatch.chdir(tmp_path)
    with refuses("conflict", option[0], InputError):
        execute([*line, *option])
    assert main([*line, *option]) == 2 and option[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, param",
    [
        (
            "vrbench judge example d --judge-url http://x/v1 --judge-model m --dtype float32",
            "judge_url",
        ),
        ("engines prune x", "folders"),
    ],
)
def test_options_that_a_command_itself_refuses(line, param, unread):
    with refuses("conflict", param, InputError):
        execute(line.split())


def test_options_are_those_of_the_line_alone():
    from nexus_rt.cli import parser
    from nexus_rt.cli.options import TABLE, options_of

    known = parser()
    assert options_of(known, ["generate", "x"]) == {"command", "prompt"}
    assert options_of(known, ["generate", "x", "--plan=large", "--small-lora", "a", "--quiet"]) == {
        "command",
        "prompt",
        "plan",
        "small_lora",
        "quiet",
    }
    args = known.parse_args(["generate", "x"])
    assert args.seed == 0 and args.attention == "auto"  # the parser itself keeps its defaults
    names = {
        a.dest
        for sub in known._subparsers._group_actions
        for p in sub.choices.values()
        for a in p._actions
    }
    names |= {"action"}
    # no rule about an option that is gone
    assert all({r.option, *r.others} - {""} <= names for r in TABLE)


@pytest.mark.process
def test_a_process_ends_with_its_code_its_output_and_what_was_registered(tmp_path):
    """It is not taken apart, so that the end costs nothing; what others asked for at the end is
    done all the same."""
    code = (
        "import atexit, sys, threading, time\n"
        "atexit.register(lambda: print('registered'))\n"
        "def late():\n"
        "    while threading.main_thread().is_alive():\n"
        "        time.sleep(0.01)\n"
        "    print('thread')\n"
        "threading.Thread(target=late).start()\n"
        "sys.argv = ['nexus-rt', *sys.argv[1:]]\n"
        "from nexus_rt.cli import entry; entry()"
    )
    run = lambda *line: subprocess.run(
        [sys.executable, "-c", code, *line], capture_output=True, text=True
    )
    done = run("plan", "--costs", "1,2", "--steps", "4")
    assert (
        done.returncode == 0
        and done.stdout.splitlines()[-2:] == ["thread", "registered"]
        and "reference:" in done.stdout
    )
    assert run("generate", " ", "-o", str(tmp_path / "a.mp4")).returncode == 2
    assert run("--version").returncode == 0 and run("generate").returncode == 2


ABSURD = [
    *(
        "nan",
        "inf",
        "Infinity",
        "1e309",
        "1e400",
        "0x10",
        "1_000",
        "\u0661\u0662",
        "\u00b2",
        "",
        " ",
    ),
    *("1" + "0" * 400, "9" * 5000, "1e-", "1,", "1;2", "1.2.3", "True", "None"),
]
NAMED_NUMBERS = {  # options whose text is a number, or holds one, and a command of theirs
    "--fps": "generate",
    "--size": "generate",
    "--vram": "generate",
    "--guidance": "generate",
    "--timesteps": "generate",
    "--shard": "batch",
    "--costs": "plan",
    "--rungs": "tune",
    "--sizes": "export",
    "--sm": "export",
    "--quota": "serve",
    "--max-size": "serve",
    "--replicas": "serve",
}


def line_of(command, option, value, folder):
    """A whole command line of a leaf (`COMMAND [ACTION]`) with one option set."""
    prompts = folder / "p.txt"
    prompts.write_text(PROMPT)
    from nexus_rt.media.latents import save_latents

    rest = {
        "generate": [PROMPT],
        "batch": [str(prompts), "-o", str(folder / "out")],
        "vrbench generate": ["example", "-o", str(folder / "out")],
        "vrbench judge": ["example", str(folder), "--judge-model", "m"],
        "tune": ["-o", str(folder / "out")],
        "export": ["-o", str(folder / "out")],
        "decode": [str(save_latents(torch.zeros(1, 16, 1, 2, 2), folder))],
    }.get(command, [])
    return [*command.split(), *rest, f"{option}={value}"]


def numeric_options():
    """(command, option, kind) of every option that is a number."""
    found = []

    def walk(parser, words):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    walk(inner, [*words, name])
            elif action.type in (int, float):
                found.append((" ".join(words), action.option_strings[-1], action.type))

    walk(cli.parser(), [])
    return found


def ends_in_our_error(words, capsys):
    """Run a command line that must be refused before any model is read."""
    try:
        code = main(words)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    written = capsys.readouterr()
    assert code == 2, (words, code, written.err[-500:])
    assert "Traceback" not in written.err and len(written.err.splitlines()[-1]) < 1700
    return written.err


@pytest.fixture
def no_models(monkeypatch):
    def read(*arguments, **options):
        raise AssertionError("a model was read")

    monkeypatch.setattr("nexus_rt.pipeline.models.load_models", read)
    monkeypatch.setattr("nexus_rt.serve.server.run_server", read)


@pytest.mark.slow
def test_a_number_that_is_none_is_refused_in_every_option(tmp_path, no_models, capsys):
    options = numeric_options()
    assert len(options) > 90
    for command, option, kind in options:
        for value in ABSURD:
            err = ends_in_our_error(line_of(command, option, value, tmp_path), capsys)
            assert "number" in err and option in err, err
        if kind is int:
            ends_in_our_error(line_of(command, option, "1.5", tmp_path), capsys)
    for option, command in NAMED_NUMBERS.items():
        for value in ABSURD:
            ends_in_our_error(line_of(command, option, value, tmp_path), capsys)


@pytest.mark.slow
def test_a_number_outside_its_range_is_refused_before_a_model_is_read(tmp_path, no_models, capsys):
    """10^30 and -10^30 are numbers, and none of any option."""
    needed = {"--workers": ["--ray"], "--tflops": ["--preset", "wan-480p"]}
    for command, option, _ in numeric_options():
        if option in ("--order", "--rho-min", "--rho-max"):
            extra = [
                "--split",
                "dct",
                *(["--lowpass", "butterworth"] if option == "--order" else []),
            ]
        else:
            extra = needed.get(option, [])
        for value in ("1" + "0" * 30, "-1" + "0" * 30):
            ends_in_our_error([*line_of(command, option, value, tmp_path), *extra], capsys)


@pytest.mark.parametrize("word", ["a\udcff", "\ud800", "a\0b"])
@pytest.mark.parametrize("option", ["--negative", "--plan", "--device", "--small", "--fps", "-o"])
def test_an_argument_that_is_no_text_is_refused(option, word, no_models, capsys):
    assert main(["generate", PROMPT, option, word]) == 2
    assert "is no text" in capsys.readouterr().err
    assert main(["generate", word]) == 2


@pytest.mark.process
def test_bytes_of_another_encoding_are_refused_in_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nexus_rt.cli", "generate", b"\xff\xfe"], capture_output=True
    )
    assert done.returncode == 2 and b"is no text" in done.stderr and b"Trace" not in done.stderr
