"""What kernel files share: a launch happens on its tensors' GPU."""

from types import SimpleNamespace

import pytest
import torch

from nexus_rt.kernels import triton_op
from nexus_rt.kernels.attention import attention
from nexus_rt.kernels.attention_fp8 import attention_fp8
from nexus_rt.kernels.band_blend import band_blend
from nexus_rt.kernels.band_filter import band_filter
from nexus_rt.kernels.modulate import modulate
from nexus_rt.kernels.qk_norm_rope import qk_norm_rope
from nexus_rt.kernels.solver_step import solver_step
from tests.needs import needs

needs("triton")


def test_the_current_gpu_is_the_tensor_s(monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    for device, wanted in (
        ("cuda:1", [torch.device("cuda:1"), "left"]),
        ("cuda:0", []),
        ("cpu", []),
    ):
        entered.clear()
        with triton_op.on_device(SimpleNamespace(device=torch.device(device))):
            pass
        assert entered == wanted


def calls(device):
    """Every kernel once: name -> call."""
    new = lambda *shape, dtype=torch.float32: torch.randn(*shape, device=device).to(dtype)
    v, eye, heads = (
        new(1, 2, 2, 8, 8),
        torch.eye(8, device=device),
        new(1, 8, 1, 64, dtype=torch.float16),
    )
    angle = new(8, 16)
    return {
        "attention": lambda: attention(heads, heads, heads),
        "attention_fp8": lambda: attention_fp8(
            *(new(1, 8, 1, 128, dtype=torch.float16) for _ in range(3))
        ),
        "band_blend": lambda: band_blend(v, None, v, None, (1.0, 1.0), 0.5, 0.4, 0.1, 0.2),
        "band_filter": lambda: band_filter(v, None, v, None, (1.0, 1.0), 0.5, 0.5, eye, eye),
        "modulate": lambda: modulate(new(1, 4, 64), new(1, 64), new(1, 64), 1e-6),
        "qk_norm_rope": lambda: qk_norm_rope(
            new(1, 8, 96), new(32), new(32), angle.cos(), angle.sin(), 1, 1e-6
        ),
        "solver_step": lambda: solver_step(v, v, None, 1.0, None, "none", 1.0, [0.5] * 8, [], 0, 1),
    }


@pytest.mark.parametrize("name", list(calls("cpu")))
def test_every_kernel_is_launched_where_its_tensors_are(name, monkeypatch):
    """On the last GPU, while another is the current one; without a GPU, that the launcher names its
    tensors' device."""
    device = (
        torch.device("cuda", torch.cuda.device_count() - 1)
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    right, launched = triton_op.on_device, []
    monkeypatch.setattr(
        triton_op, "on_device", lambda like: (launched.append(like.device), right(like))[1]
    )
    calls(device)[name]()
    assert launched and set(launched) == {device}
