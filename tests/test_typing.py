"""Static tools find every module of an installed package: kernels, export and bench too, which stand
at the repository's top."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import needs

ROOT = Path(__file__).resolve().parent.parent
SNIPPET = """
from nexus_rt.bench.tables import headline
from nexus_rt.export.contract import rename
from nexus_rt.method.guidance import (Guidance)
from nexus_rt.kernels.modulate import launch_config
reveal_type(headline)
reveal_type(rename)
reveal_type(Guidance.of(6))
reveal_type(launch_config)
rename(1)
"""
CONFIG = """
[mypy]
explicit_package_bases = true
ignore_missing_imports = true
follow_imports = silent
[mypy-torch.*,numpy.*,transformers.*,diffusers.*,onnx.*,triton.*,huggingface_hub.*,PIL.*,av.*,msgspec.*]
follow_imports = skip
"""


@pytest.mark.toolchain
def test_the_checker_knows_the_types_of_all_four(tmp_path):
    needs("mypy", "setuptools")
    tree = tmp_path / "tree"
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tree)]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(tmp_path / "mypy.ini"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "snippet.py")], capture_output=True, text=True, cwd=tree
    )
    found = [
        line.split("Revealed type is ")[1]
        for line in done.stdout.splitlines()
        if "Revealed type is" in line
    ]
    assert len(found) == 4 and not [t for t in found if t == '"Any"'], done.stdout
    assert "Guidance" in found[2] and "dict[" in found[3]
    assert 'Argument 1 to "rename" has incompatible type "int"' in done.stdout


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "nexus_rt" / "py.typed").is_file()
