"""README is short and its links lead somewhere; the documentation builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import needs

ROOT = Path(__file__).resolve().parent.parent


def test_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_every_link_of_a_page_leads_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), (
            target
        )


@pytest.mark.toolchain
def test_the_documentation_builds(tmp_path):
    needs("mkdocs", "mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    api = (tmp_path / "api" / "index.html").read_text()
    for module, members in re.findall(
        r"(?m)^::: (\S+)\n    options:\n(?:      \w+: true\n)?      members: \[(.*)\]",
        (ROOT / "docs" / "api.md").read_text(),
    ):
        for member in members.split(", "):
            assert f'id="{module}.{member}"' in api, f"{module}.{member}"
    assert "Walk a plan from noise to clean latents" in api


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_commands_of_the_documentation_are_the_command_line_s(page):
    """Every option that a page shows is one that its command takes."""
    from nexus_rt.cli import parser

    known = {
        c: p
        for a in parser()._actions
        if hasattr(a, "choices") and isinstance(a.choices, dict)
        for c, p in a.choices.items()
    }
    for line in re.findall(r"(?m)^nexus-rt (.*(?:\\\n.*)*)", (ROOT / "docs" / page).read_text()):
        command, *words = line.split("#")[0].split()
        options = {o for a in known[command]._actions for o in a.option_strings}
        if command == "vrbench":
            actions = next(
                a for a in known[command]._actions if isinstance(getattr(a, "choices", None), dict)
            )
            options = {o for a in actions.choices[words[0]]._actions for o in a.option_strings}
        assert {w for w in words if w.startswith("--")} <= options, line
