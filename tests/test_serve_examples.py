"""examples/serve/: the programs against a running server, the files by those who read them."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_rt.cli import parser
from nexus_rt.media.reading import read_frames, read_metadata
from tests.needs import needs
from tests.serving import PROMPT, ServerProcess, ask, wait_for

SERVE = Path(__file__).resolve().parent.parent / "examples" / "serve"
KEY = "an-example-key"


def node():
    """Node, of the system or the one that Playwright brings."""
    try:
        import playwright
    except ImportError:
        return shutil.which("node")
    own = Path(playwright.__file__).parent / "driver" / "node"
    return shutil.which("node") or (str(own) if own.exists() else None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    keys = folder / "keys"
    keys.write_text(f"# ours\n{KEY}\n")
    environment = {"NEXUS_RT_API_KEY": ""}
    with ServerProcess(folder / "store", "--api-key-file", str(keys), env=environment) as process:
        yield process.ready()


def run(server, *command, key=KEY):
    environment = {
        **os.environ, "OPENAI_BASE_URL": f"{server.address}/v1", "OPENAI_API_KEY": key,
    }  # fmt: skip
    return subprocess.run([*command], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("program", ["client.py", "client.mjs", "curl.sh"])
@pytest.mark.process
def test_the_clients_make_a_clip(server, tmp_path, program):
    runs = {"client.py": sys.executable, "client.mjs": node(), "curl.sh": shutil.which("sh")}
    if runs[program] is None or (program == "curl.sh" and not shutil.which("curl")):
        pytest.skip(f"nothing here runs {program}")
    path = tmp_path / "clip.mp4"
    done = run(server, runs[program], str(SERVE / program), PROMPT, str(path))
    assert done.returncode == 0, done.stderr
    assert f"{path}: video_" in done.stdout
    assert read_frames(path).shape == (17, 64, 64, 3)
    assert (read_metadata(path)["seed"], read_metadata(path)["prompt"]) == (7, PROMPT)
    if program == "client.mjs":
        assert "step 10 of 10: large" in done.stdout
    refused = run(server, runs[program], str(SERVE / program), PROMPT, str(path), key="wrong-key-1")
    assert refused.returncode != 0 and "API key" in refused.stderr + refused.stdout


def test_the_embedded_application(tmp_path, monkeypatch):
    needs("fastapi")
    import importlib.util

    from tests.serving import serving

    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("embedded", SERVE / "embedded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with serving(module.server, module.app) as address:
        wait_for(lambda: module.server.dispatcher.ready)
        job = ask(address, "/video/v1/videos", "POST", {"prompt": PROMPT})[2]
        path = f"/video/v1/videos/{job['id']}"
        wait_for(lambda: ask(address, path)[2]["status"] == "completed")
        assert ask(address, "/")[2] == {
            "ready": True,
            "jobs": {"queued": 0, "in_progress": 0, "completed": 1, "failed": 0},
        }


def test_the_files_that_start_it_pass_options_that_there_are():
    """A Dockerfile, a compose file and a unit: read as their readers do, their commands parsed."""
    yaml = pytest.importorskip("yaml")
    docker = (SERVE / "Dockerfile").read_text()
    instructions = re.findall(r"(?m)^([A-Z]+) ", docker.replace("\\\n", ""))
    assert instructions[0] == "FROM" and "USER" in instructions and "HEALTHCHECK" in instructions
    entry = yaml.safe_load(re.search(r"(?m)^ENTRYPOINT (\[.*\])$", docker)[1])
    for name in re.findall(r"(?m)^COPY (.*) \S+$", docker):
        for part in name.split():
            assert (SERVE.parent.parent / part).exists(), part
    service = yaml.safe_load((SERVE / "compose.yaml").read_text())["services"]["nexus-rt"]
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(SERVE / "nexus-rt.service")
    start = shlex.split(unit["Service"]["ExecStart"])
    for command in (entry, [*entry, *service["command"]], start):
        args = parser().parse_args(command[1:])
        assert args.command == "serve" and command[0].endswith("nexus-rt")
    assert args.grace < float(unit["Service"]["TimeoutStopSec"])
    assert unit["Service"]["Restart"] == "always" and entry[2:4] == ["--host", "0.0.0.0"]
    assert "NEXUS_RT_API_KEY" in service["environment"]
    grace = parser().parse_args([*entry, *service["command"]][1:]).grace
    assert grace < float(service["stop_grace_period"].removesuffix("s"))


@pytest.mark.slow
def test_the_load_test_counts_what_it_sends(tmp_path, capsys):
    import json

    from nexus_rt.bench import serve as load

    out = tmp_path / "serve.json"
    sizes = ["--jobs", "60", "--connections", "40", "--gets", "100", "--malformed", "24"]
    sizes += ["--running", "3", "--runs", "1"]
    assert load.main([*sizes, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    churn, held, lost = report["churn"], report["connections"], report["lost"]
    assert churn["cancelled"] + churn["completed"] == 60 and churn["refused"] == 0
    assert (held["open"], held["dropped"]) == (40, 0)
    assert sum(report["malformed"].values()) == 24 and set(report["malformed"]) == {"400"}
    assert lost["submitted"] == lost["ended"] == 60 + 60 + 3 + 1 and lost["ready"]
    assert 0 < report["quiet_get_ms"]["p50"] <= report["quiet_get_ms"]["p95"]
    assert set(report["parts"]["batch_ms_a_clip"]) == {"1", "2", "4"}
    assert 0 < report["parts"]["preview_ms"]["64x64"] < report["parts"]["preview_ms"]["832x480"]
    from nexus_rt.bench.tables import load_table

    assert "| jobs accepted, ended, lost | 124, 124, 0 |" in load_table(report)
