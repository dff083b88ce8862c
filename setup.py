"""One installed top-level name: `kernels/`, `export/` and `bench/` install inside `nexus_rt`."""

import shutil
from pathlib import Path

from setuptools import setup

# an earlier build's files would be installed again, those of modules that are gone too
shutil.rmtree(Path(__file__).resolve().parent / "build" / "lib", ignore_errors=True)

setup(
    packages=[
        "nexus_rt",
        "nexus_rt.core",
        "nexus_rt.kernels",
        "nexus_rt.media",
        "nexus_rt.ops",
        "nexus_rt.models",
        "nexus_rt.method",
        "nexus_rt.loading",
        "nexus_rt.loading.formats",
        "nexus_rt.memory",
        "nexus_rt.engines",
        "nexus_rt.components",
        "nexus_rt.parallel",
        "nexus_rt.pipeline",
        "nexus_rt.serve",
        "nexus_rt.export",
        "nexus_rt.bench",
        "nexus_rt.bench.gpu",
        "nexus_rt.bench.shapes",
        "nexus_rt.bench.tune",
        "nexus_rt.bench.vrbench",
        "nexus_rt.cli",
    ],
    package_dir={
        "nexus_rt.kernels": "kernels",
        "nexus_rt.export": "export",
        "nexus_rt.bench": "bench",
        "nexus_rt.bench.gpu": "bench/gpu",
        "nexus_rt.bench.shapes": "bench/shapes",
        "nexus_rt.bench.tune": "bench/tune",
        "nexus_rt.bench.vrbench": "bench/vrbench",
    },
    include_package_data=False,
    package_data={
        "nexus_rt": ["mini/*.json", "mini/*/*"],
        "nexus_rt.serve": ["*.json", "page/*"],
        "nexus_rt.kernels": ["README.md"],
        "nexus_rt.bench.vrbench": ["*.json"],
    },
)
