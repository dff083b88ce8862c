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


def in_child(pair, queue):
    try:
        load_and_call(pair)
        queue.put("right")
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("method, words", [("fork", "was forked from process"), ("spawn", "right")])
def test_a_forked_child_is_told_and_a_spawned_one_works(tiny_pair, method, words):
    code = f"""
import sys, multiprocessing, torch
sys.path.insert(0, {ROOT!r})
from tests.test_process import in_child, load_and_call
if __name__ == "__main__":
    torch.set_num_threads(2)
    load_and_call({str(tiny_pair)!r})
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    child = context.Process(target=in_child, args=({str(tiny_pair)!r}, queue))
    child.start()
    print(queue.get(timeout=100))
    child.join(20)
    assert child.exitcode == 0
"""
    script = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"fork-{os.getpid()}-{method}.py")
    with open(script, "w") as file:
        file.write(code)
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=150
        )
    finally:
        os.unlink(script)
    assert words in done.stdout, done.stdout + done.stderr[-1500:]


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
