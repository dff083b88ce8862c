"""What "auto" chose is in the log; without a level that asks for it, nothing is."""

import logging

import pytest
import torch

from nexus_rt import NexusPipeline
from nexus_rt.cli import main
from nexus_rt.core import log


@pytest.fixture(autouse=True)
def nothing_written():
    log.write_once.cache_clear()


def test_every_choice_and_its_reason(tiny_pair, caplog):
    caplog.set_level(logging.INFO, "nexus_rt")
    pipe = NexusPipeline.from_pretrained(tiny_pair, vram="1GB")
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        pipe("a red circle", num_inference_steps=2)
    lines = [r.getMessage() for r in caplog.records if r.name == "nexus_rt"]
    if not torch.cuda.is_available():
        for line in (
            "device: cpu (PyTorch sees no GPU)",
            "dtype of generators and encoders: torch.float32 (the device is cpu)",
            "kernels: torch (the device is cpu)",
            "attention: sdpa (the device is cpu)",
            "VAE tiling: off (frames of 48x32 against 921600 pixels)",
        ):
            assert lines.count(line) == 1, lines
    # decided at every call
    assert sum(line.startswith("residency: resident (its peak is ") for line in lines) == 2


def test_a_program_that_asks_for_nothing_reads_nothing(tiny_pair, capfd, monkeypatch):
    logger = logging.getLogger("nexus_rt")
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])  # commands before left theirs
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    logger.manager._clear_cache()
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", num_inference_steps=2)
    assert capfd.readouterr().err == ""


def test_the_command_line_shows_it(tiny_pair, tmp_path, capsys):
    line = [
        "generate",
        "a red circle",
        "--pair",
        str(tiny_pair),
        "--steps",
        "2",
        "-o",
        str(tmp_path / "a.png"),
        "--quiet",
    ]
    assert main([*line, "--device", "cpu", "--log-level", "info"]) == 0
    assert "nexus-rt: INFO: kernels: torch (the device is cpu)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*line, "--log-level", "loud"])
