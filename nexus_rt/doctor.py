"""What this machine has: versions, devices, and which backends work and why others do not."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec

from nexus_rt import __version__

PACKAGES = ("torch", "triton", "transformers", "diffusers", "safetensors", "numpy", "av", "onnx", "onnxruntime", "tensorrt")


def versions() -> dict[str, str | None]:
    """Installed versions, None for what is not there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def backends() -> dict[str, tuple[bool, str]]:
    """Backend name -> (works here, in words)."""
    import torch

    from nexus_rt.ops import cannot_run_triton

    cuda = torch.cuda.is_available()
    why = cannot_run_triton(torch.device("cuda" if cuda else "cpu"))
    no_gpu = "no CUDA device" if torch.version.cuda else "this PyTorch build has no CUDA"
    return {
        "torch (cpu)": (True, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        "torch (cuda)": (cuda, torch.cuda.get_device_name() if cuda else no_gpu),
        "triton kernels": (why is None, why or "norms, RoPE and modulation of the generators"),
        "aoti, onnx, tensorrt engines": (False, "not in this version of nexus-rt; the torch engine runs instead"),
    }


def report() -> str:
    """A page of text."""
    import torch

    from nexus_rt.pair import MINI

    lines = [f"nexus-rt {__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += [f"  {name:13} {version or 'not installed'}" for name, version in versions().items()]
    lines += ["", "devices"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    lines.append(f"  cpu           {os.cpu_count()} cores, {memory:.1f} GiB")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"  cuda:{i}        {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB")
    lines += ["", "backends"]
    lines += [f"  {'yes' if ok else 'no ':3} {name:28} {why}" for name, (ok, why) in backends().items()]
    lines += ["", f"mini pair     {'present' if (MINI / 'model_index.json').is_file() else 'missing: reinstall the package'}"]
    lines.append(f"video files   {'yes' if find_spec('av') else 'no: install av'}")
    return "\n".join(lines)
