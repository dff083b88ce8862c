"""The ops as torch.compile sees them: one whole graph of a DiT on the meta device, the kernels
standing in it."""

import os
import subprocess
import sys

import pytest

from tests.needs import needs

needs("triton")
pytestmark = pytest.mark.toolchain
TRACE = """
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from nexus_rt.ops import block_ops
from nexus_rt.kernels.attention import attention
from nexus_rt.kernels.band_blend import band_blend
from nexus_rt.kernels.band_filter import band_filter
from nexus_rt.kernels.modulate import modulate
from nexus_rt.kernels.triton_op import INTERPRETED
from nexus_rt.kernels.qk_norm_rope import qk_norm_rope
from nexus_rt.kernels.solver_step import solver_step
from nexus_rt.loading.checkpoint import KEEP_FP32
from nexus_rt.models.wan import WanConfig, WanTransformer

from nexus_rt.method.filters import (split_filter)

assert not INTERPRETED
with torch.device("meta"):
    model = WanTransformer(WanConfig(num_attention_heads=2, attention_head_dim=32, ffn_dim=64, num_layers=2, text_dim=32,
                                     freq_dim=32)).to(torch.bfloat16)
    latents, context, t = torch.empty(2, 16, 2, 4, 4), torch.ones(2, 5, 32), torch.tensor(3.0)
    q = torch.empty(1, 8, 2, 32)
for name, parameter in model.named_parameters():  # as a checkpoint is loaded
    if any(part in name for part in KEEP_FP32):
        parameter.data = parameter.data.float()
table = block_ops.Ops("triton", modulate, qk_norm_rope, block_ops.rope_pairs, block_ops.linear_gelu_epilogue)
for module in model.modules():
    if hasattr(module, "ops"):
        module.ops = table
graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return graph.forward

keep = aot_autograd(fw_compiler=keep)  # each op's launcher is traced too, on tensors without memory

with torch.no_grad():
    prepared = model.prepare_context(context, collapse=False)
    out = torch.compile(model, fullgraph=True, backend=keep)(latents, t, prepared)
    torch.compile(lambda q: attention(q, q, q), fullgraph=True, backend=keep)(q)

    def step(small, small_u, large, large_u, x, history, f):
        u, sums = band_blend(small, small_u, large, large_u, (5.0, 3.0), 0.4, 0.4, 0.2, 0.2)
        v, _ = band_filter(small, None, large, None, (1.0, 1.0), 0.4, 0.2, f.left, f.right, f.gain)
        return solver_step(x, u + v, None, 1.0, sums, "progressive", 0.4, [0.5] * 8, history, 3, 2)[0]

    f = split_filter(8, 8, "dct", "butterworth", 2, 0.5, torch.device("meta"))
    x = torch.empty(2, 4, 2, 8, 8, device="meta")
    assert torch.compile(step, fullgraph=True, backend=keep)(*[x.bfloat16()] * 4, x, [x] * 3, f).shape == x.shape
assert out.shape == latents.shape and len(graphs) == 3
for graph in graphs:
    indices = [n.kwargs["kernel_idx"] for n in graph.graph.nodes if n.op == "call_function" and "kernel_idx" in n.kwargs]
    print(*sorted(kernel_side_table.get_kernel(i).fn.__name__ for i in indices))
"""


def test_the_dit_and_a_step_are_whole_graphs_with_their_kernels_in_them():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", TRACE], env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    dit, attention, step = (line.split() for line in said.stdout.splitlines())
    # a block's norms, and the last
    assert dit.count("_modulate_kernel") == 2 * 3 + 1 and dit.count("_qk_norm_rope_kernel") == 2
    assert attention == ["_attention_kernel"]
    assert step == ["_product_kernel", "_product_kernel", "_solver_kernel", "_stencil_kernel"]
