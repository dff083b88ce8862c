"""Exporting a model as wide as Wan2.1-1.3B, in a process of its own, with the memory it takes
besides the tools'."""

import json
import os
import subprocess
import sys

import pytest

from tests.needs import needs

needs("onnx", "onnxscript", "onnxruntime")
pytestmark = pytest.mark.export
CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from nexus_rt.core.size import ClipSize
from nexus_rt.export.build import Target, export_component
from nexus_rt.export.components import GeneratorComponent

def held():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

backend, tiny, wide = sys.argv[1:]
target = Target(backend, "fp32", (ClipSize(32, 32, 5),), torch.device("cpu"))
export_component(GeneratorComponent("small", Path(tiny)), target, "x")  # imports and compilers: what the tools take for any model
before, peak, over = held(), [0], threading.Event()

def watch():
    while not over.is_set():
        peak[0] = max(peak[0], held() - before)
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
engine = export_component(GeneratorComponent("small", Path(wide)), target, "x")
over.set()
thread.join()
print(json.dumps({"peak": peak[0], "passed": engine.manifest.parity["passed"], "bytes": engine.nbytes}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("wide")
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["onnx", "aoti"])
def test_exporting_takes_little_more_than_the_weights(backend, wide, tiny_pair, tmp_path):
    weights = sum(p.stat().st_size for p in wide.glob("*.safetensors"))
    assert weights > 450e6
    child = subprocess.run(
        [sys.executable, "-c", CHILD, backend, str(tiny_pair / "small"), str(wide)],
        env={**os.environ, "NEXUS_RT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    said = json.loads(child.stdout.splitlines()[-1])
    print(f"{backend}: {said['peak'] / weights:.2f} times the weights")
    assert said["passed"] and said["bytes"] > 0.99 * weights
    assert said["peak"] <= 1.3 * weights
