"""One top-level name, in every way of installing it and from every folder; nothing of ours runs for
anyone else."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.needs import needs

ROOT = Path(__file__).resolve().parent.parent
USE = """
import nexus_rt, nexus_rt.bench.core, nexus_rt.export, nexus_rt.kernels
from nexus_rt import blend
import torch
v = torch.ones(1, 1, 1, 4, 4)
assert torch.allclose(blend(v, v, 0.0), v, atol=1e-4)
print(nexus_rt.__file__)
print(nexus_rt.bench.core.__file__)
"""


def python(code, cwd, *flags, path=None):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked sources: a build leaves nothing in the checkout."""
    needs("setuptools")
    copy = tmp_path_factory.mktemp("source")
    for name in (
        "nexus_rt",
        "kernels",
        "export",
        "bench",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    return copy


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """A regular install into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=300)
    return target


def test_setup_lists_every_package():
    """Nothing else says so: an editable install finds the folders by itself."""
    (call,) = (
        n.value
        for n in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
        if getattr(n.value.func, "id", None) == "setup"
    )
    listed = ast.literal_eval(next(k.value for k in call.keywords if k.arg == "packages"))
    tracked = subprocess.run(
        ["git", "ls-files", "nexus_rt/*.py", "kernels/*.py", "export/*.py", "bench/*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    folders = {str(Path(f).parent).replace("/", ".") for f in tracked.stdout.split()}
    programs = {"bench.micro"}  # of pytest, run from a checkout
    wanted = {f if f.startswith("nexus_rt") else f"nexus_rt.{f}" for f in folders - programs}
    assert sorted(listed) == sorted(wanted)


@pytest.mark.packaging
def test_a_regular_install_has_one_name_and_all_its_files(installed, tmp_path):
    names = {
        p.name for p in installed.iterdir() if not p.name.endswith(".dist-info") and p.name != "bin"
    }
    assert names == {"nexus_rt"}
    tracked = {
        p.relative_to(ROOT / "nexus_rt")
        for p in (ROOT / "nexus_rt").rglob("*")
        if p.suffix in (".py", ".json", ".safetensors", ".html", ".js", ".css")
    }
    assert all((installed / "nexus_rt" / p).is_file() for p in tracked)
    walk = """
import importlib, pkgutil, nexus_rt
names = [m.name for m in pkgutil.walk_packages(nexus_rt.__path__, "nexus_rt.")]
print(len([importlib.import_module(n) for n in names if not n.endswith("__main__")]) > 250)
"""
    assert python(walk, tmp_path, path=installed)[0] == "True"
    out = python(USE, tmp_path, path=installed)
    assert out[0].startswith(str(installed)) and out[1] == str(
        installed / "nexus_rt" / "bench" / "core.py"
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P is new in 3.11")
@pytest.mark.packaging
def test_a_regular_install_started_from_the_checkout(installed):
    """-P: the current folder is not on the path, as for the `nexus-rt` command, so the installed
    package is found."""
    assert python(USE, ROOT, "-P", path=installed)[1].startswith(str(installed))


@pytest.mark.packaging
def test_an_editable_install_from_anywhere(source, tmp_path):
    target = tmp_path / "site"
    build = (
        "from setuptools.build_meta import build_editable; import sys;"
        " print(build_editable(sys.argv[1]))"
    )
    target.mkdir()
    subprocess.run(
        [sys.executable, "-c", build, str(target)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=300,
    )
    wheel = next(target.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    # An editable wheel holds a .pth file, which `site.addsitedir` reads as an installation would;
    # the environment that runs these tests may hold an editable install of its own, which must not
    # answer for this one.
    start = f"""
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
for name in [m for m in sys.modules if m.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {str(target)!r})
site.addsitedir({str(target)!r})
"""
    for cwd in (tmp_path, source):
        out = python(start + USE, cwd)
        assert out[0] == str(source / "nexus_rt" / "__init__.py") and out[1] == str(
            source / "bench" / "core.py"
        )


@pytest.mark.packaging
def test_other_packages_run_nothing_of_ours():
    """transformers looks for a package `kernels`, and finds our folder where Python starts in the
    root of a checkout: its `__init__` defines nothing, and is not taken for that package."""
    code = """
import os, sys, transformers, diffusers
from transformers import UMT5EncoderModel
from transformers.utils import import_utils
from diffusers import WanTransformer3DModel, AutoencoderKLWan
root = os.getcwd()
files = [getattr(m, "__file__", None) or "" for m in list(sys.modules.values())]
ours = [os.path.relpath(f, root) for f in files if f.startswith(root + os.sep) and os.sep + "site-packages" + os.sep not in f]
print([f for f in ours if f != os.path.join("kernels", "__init__.py")])  # .venv may lie here
print(getattr(import_utils, "is_kernels_available", bool)())
"""
    assert python(code, ROOT)[:2] == ["[]", "False"]
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert all(isinstance(n, ast.Expr | ast.Assign) for n in tree.body)


@pytest.mark.packaging
def test_the_import_is_light():
    code = """
import sys, time
start = time.perf_counter()
import nexus_rt
seconds = time.perf_counter() - start
heavy = [m for m in ("torch", "transformers", "diffusers", "torch._dynamo", "torch._inductor", "numpy") if m in sys.modules]
print(seconds < 0.5, heavy)
from nexus_rt import parse_plan, BlendConfig
print([m for m in ("transformers", "diffusers", "torch._dynamo", "torch._inductor") if m in sys.modules])
"""
    out = python(code, ROOT)
    assert out[0] == "True []" and out[1] == "[]"


def test_the_public_names_are_there():
    import nexus_rt

    for name in nexus_rt.__all__:
        assert getattr(nexus_rt, name) is not None
    assert set(nexus_rt.__all__) <= set(dir(nexus_rt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nexus_rt.nothing


@pytest.mark.parametrize(
    "command", ["generate", "plan", "batch", "serve", "bench", "export", "tune"]
)
@pytest.mark.packaging
def test_a_help_text_imports_no_framework(command):
    """It comes at once; PyTorch alone takes a second."""
    program = f"""
import sys
from nexus_rt import cli
try:
    cli.main(["{command}", "--help"])
except SystemExit as end:
    heavy = ("torch", "numpy", "transformers", "diffusers")
    print(end.code, [m for m in heavy if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "0 []", done.stderr
