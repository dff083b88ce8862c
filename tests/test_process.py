"""Inside somebody's program: threads, forks, and nothing of theirs changed."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nexus_rt import NexusPipeline

CALL = dict(num_inference_steps=2, plan="large", output_type="latent")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def load_and_call(pair):
    pipe = NexusPipeline.from_pretrained(pair)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **CALL).frames


@pytest.mark.process
def test_eight_threads_load_and_call_at_once(tiny_pair):
    """In a fresh process, so that first imports race too; then the host builds a module of its
    own."""
    code = f"""
import sys, torch
sys.path.insert(0, {ROOT!r})
from concurrent.futures import ThreadPoolExecutor
import threading, transformers
before = torch.nn.Module.register_parameter
start = threading.Barrier(8)
def work(i):
    start.wait()
    from nexus_rt import NexusPipeline
    pipe = NexusPipeline.from_pretrained({str(tiny_pair)!r})
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=2, plan="large", output_type="latent")
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames
with ThreadPoolExecutor(8) as pool:
    frames = list(pool.map(work, range(8)))
assert all(torch.equal(f, frames[0]) for f in frames)
assert torch.nn.Module.register_parameter is before
own = torch.nn.Linear(3, 4)
assert own.weight.device.type == "cpu" and float(own.weight.abs().sum()) > 0
print("right")
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.stdout.strip().endswith("right"), done.stderr[-2000:]


def test_calls_of_one_pipeline_run_one_after_the_other(tiny_pipe):
    seeds = range(6)
    alone = [
        tiny_pipe("a red circle", generator=torch.Generator().manual_seed(s), **CALL).frames
        for s in seeds
    ]
    running, most, lock = 0, 0, threading.Lock()

    def callback(pipe, index, timestep, tensors):
        nonlocal running, most
        with lock:
            running += index == 0
            most = max(most, running)
            running -= index == 1

    def call(seed):
        return tiny_pipe(
            "a red circle",
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=callback,
            **CALL,
        ).frames

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(call, seeds))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)) and most == 1


CHILDREN = {  # what a child does with the pair's folder and the parent's pipeline
    "load and call": "load_and_call(pair)",
    "load": "NexusPipeline.from_pretrained(pair)",
    "load a transformer": "load_transformer(pair + '/small', torch.float32)",
    "call": "pipe('a red circle', num_inference_steps=2, output_type='latent')",
    "encode": "pipe.encode_prompt('a red circle')",
    "draw noise": "pipe.prepare_latents(1, ClipSize(48, 32, 5))",
    "decode": "pipe.decode(torch.zeros(1, 16, 2, 4, 6))",
    "sample": "sample(torch.zeros(1, 16, 2, 4, 6), pipe.make_plan(), pipe.engines, {})",
    "change LoRAs": "pipe.set_loras(small=())",
}
PARENTS = {  # what the parent has done before
    "loaded": "pipe = NexusPipeline.from_pretrained(pair)",
    "called": "pipe = NexusPipeline.from_pretrained(pair); load_and_call(pair)",
    "one thread, then two": (
        "torch.set_num_threads(1); load_and_call(pair); torch.set_num_threads(2);"
        " pipe = NexusPipeline.from_pretrained(pair); torch.set_num_threads(1)"
    ),
}


def outcome(tiny_pair, parent, child, method="fork", threads=2):
    """The words of a child of a process that has loaded; both are killed when they hang."""
    code = f"""
import os, sys, multiprocessing, torch
sys.path.insert(0, {ROOT!r})
from tests.test_process import load_and_call
from nexus_rt import NexusPipeline
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.method.loop import sample
from nexus_rt.core.size import ClipSize
pair = {str(tiny_pair)!r}

def in_child(queue):
    try:
        {child}
        queue.put("right")
    except Exception as error:
        queue.put(f"{{type(error).__name__}}: {{error}}")

if __name__ == "__main__":
    torch.set_num_threads({threads})
    {parent}
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    process = context.Process(target=in_child, args=(queue,), daemon=True)
    process.start()
    print(queue.get(timeout=100))
    process.join(20)
    assert process.exitcode == 0
"""
    script = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"fork-{os.getpid()}.py")
    with open(script, "w") as file:
        file.write(code)
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script],
            capture_output=True,
            text=True,
            timeout=150,
            start_new_session=True,
        )
    finally:
        os.unlink(script)
    return done.stdout + done.stderr[-1500:]


REFUSED = "NexusError: this process was forked from process"


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.process
def test_a_child_forked_after_loading_is_told_at_whatever_it_does_first(tiny_pair, child):
    assert outcome(tiny_pair, PARENTS["loaded"], CHILDREN[child]).startswith(REFUSED)


@pytest.mark.parametrize("parent", ["called", "one thread, then two"])
@pytest.mark.process
def test_a_child_forked_after_a_call_is_told(tiny_pair, parent):
    assert outcome(tiny_pair, PARENTS[parent], CHILDREN["call"]).startswith(REFUSED)


@pytest.mark.parametrize(
    "parent, method, threads",
    [
        (PARENTS["called"], "spawn", 2),
        ("pass", "fork", 2),  # it has only imported
        (PARENTS["called"], "fork", 1),  # there are no threads that the child could miss
        (
            "from nexus_rt.core.process import LOADING; import threading, time; threading.Thread(target="
            "lambda: (LOADING.__enter__(), time.sleep(60)), daemon=True).start(); time.sleep(0.5)",
            "fork",
            1,
        ),
    ],
    ids=["spawned", "forked before", "one thread", "while another thread loads"],
)
@pytest.mark.process
def test_other_children_work(tiny_pair, parent, method, threads):
    child = CHILDREN["load and call"]
    assert outcome(tiny_pair, parent, child, method, threads).startswith("right")


def state():
    """What a host owns."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "benchmark": torch.backends.cudnn.benchmark,
        "rng": torch.get_rng_state().tolist(),
        "parameters": torch.nn.Module.register_parameter,
        "init": torch.nn.init.kaiming_uniform_,
        "empty": torch.empty,
        "handlers": list(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "filters": list(warnings.filters),
        "log filters": list(logging.getLogger("transformers.modeling_utils").filters),
        "hook": sys.excepthook,
        "path": list(sys.path),
        "folder": os.getcwd(),
        "start": multiprocessing.get_start_method(allow_none=True),
        "stdout": sys.stdout,
        "umask": os.umask(os.umask(0)),
    }


def test_load_and_call_change_nothing_and_print_nothing(tiny_pair, capfd, tmp_path):
    load_and_call(tiny_pair)  # what is imported now stays so
    capfd.readouterr()
    before = state()
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "a red circle", generator=torch.Generator().manual_seed(0), **{**CALL, "output_type": "np"}
    )
    after = state()
    assert {k for k in before if before[k] != after[k]} == set()
    assert capfd.readouterr() == ("", "")


@pytest.mark.process
def test_importing_the_package_changes_nothing():
    code = f"""
import os, signal, sys, warnings, logging
sys.path.insert(0, {ROOT!r})
state = lambda: (dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(warnings.filters),
                 list(logging.getLogger().handlers), os.getcwd())
before = state()
import nexus_rt
assert state() == before and "torch" not in sys.modules
print("right")
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "right"
    )
