"""`nexus-rt doctor`: what this machine has: versions, devices, which backends work and why others
do not."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.util import find_spec

from nexus_rt import __version__
from nexus_rt.core.errors import InputError
from nexus_rt.core.versions import versions


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    commands.add_parser(
        "doctor", help="versions, devices, which backends work here and why others do not"
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    print(report())
    return 0


def backends() -> dict[str, tuple[bool, str]]:
    """Backend name -> (works here, in words)."""
    import torch

    from nexus_rt.engines import onnx, tensorrt
    from nexus_rt.ops.block_ops import cannot_run_triton

    cuda = torch.cuda.is_available()
    why = cannot_run_triton(torch.device("cuda" if cuda else "cpu"))
    no_gpu = "no CUDA device" if torch.version.cuda else "this PyTorch build has no CUDA"
    return {
        "torch (cpu)": (
            True,
            f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        ),
        "torch (cuda)": (cuda, torch.cuda.get_device_name() if cuda else no_gpu),
        "triton kernels": (why is None, why or "blend, solver, norms, RoPE and attention"),
        "aoti engines": (True, "run here; exporting one needs a C++ compiler"),
        "onnx engines": (onnx.why_not() is None, onnx.why_not() or f"onnxruntime {onnx.version()}"),
        **{f"{name} engines": _tensorrt(name, cuda) for name in tensorrt.PACKAGES},
    }


def _tensorrt(name: str, cuda: bool) -> tuple[bool, str]:
    from nexus_rt.engines import tensorrt

    try:
        tensorrt.package(name)
    except InputError as error:
        return False, str(error).rstrip(".")
    version = f"{name} {tensorrt.version(name)}"
    return (
        cuda,
        version if cuda else f"{version} is installed, and engines run on a CUDA device only",
    )


def report() -> str:
    """A page of text."""
    import torch

    from nexus_rt.loading.pair_folder import MINI

    lines = [
        f"nexus-rt {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "",
    ]
    lines += [f"  {name:13} {version or 'not installed'}" for name, version in versions().items()]
    lines += ["", "devices"]
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if hasattr(os, "sysconf")
        else 0
    )
    lines.append(f"  cpu           {os.cpu_count()} cores, {memory:.1f} GiB")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"  cuda:{i}        {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB"
        )
    whole = (MINI / "model_index.json").is_file()
    lines += ["", "backends"]
    lines += [
        f"  {'yes' if ok else 'no ':3} {name:28} {why}" for name, (ok, why) in backends().items()
    ]
    lines += [
        "",
        f"mini pair     {'present' if whole else 'missing: reinstall the package'}",
    ]
    lines.append(f"video files   {'yes' if find_spec('av') else 'no: install av'}")
    return "\n".join(lines)
