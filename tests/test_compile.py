"""The ops as torch.compile sees them: one whole graph of a DiT on the meta device, the kernels standing in it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TRACE = """
import torch
from nexus_rt import ops
from nexus_rt.kernels.attention import attention
from nexus_rt.kernels.modulate import modulate
from nexus_rt.kernels.op import INTERPRETED
from nexus_rt.kernels.qk_norm_rope import qk_norm_rope
from nexus_rt.models.wan import WanConfig, WanTransformer

assert not INTERPRETED
with torch.device("meta"):
    model = WanTransformer(WanConfig(num_attention_heads=2, attention_head_dim=32, ffn_dim=64, num_layers=2, text_dim=32,
                                     freq_dim=32)).to(torch.bfloat16)
    latents, context, t = torch.empty(2, 16, 2, 4, 4), torch.ones(2, 5, 32), torch.tensor(3.0)
    q = torch.empty(1, 8, 2, 32)
table = ops.Ops("triton", modulate, qk_norm_rope, ops.rope_pairs)
for module in model.modules():
    if hasattr(module, "ops"):
        module.ops = table
graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return graph.forward

prepared = model.prepare_context(context, collapse=False)
out = torch.compile(model, fullgraph=True, backend=keep)(latents, t, prepared)
torch.compile(lambda q: attention(q, q, q), fullgraph=True, backend=keep)(q)
assert out.shape == latents.shape and len(graphs) == 2
for graph in graphs:
    print(*sorted(str(n.target) for n in graph.graph.nodes if "nexus_rt" in str(n.target)))
"""


def test_the_dit_is_one_graph_with_its_kernels_in_it():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", TRACE], env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    dit, attention = (line.split() for line in said.stdout.splitlines())
    names = [n.split(".")[1] for n in dit]
    assert names.count("modulate") == 2 * 3 + 1 and names.count("qk_norm_rope") == 2  # a block's three norms, and the last
    assert [n.split(".")[1] for n in attention] == ["attention"]
