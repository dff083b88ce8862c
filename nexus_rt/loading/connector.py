"""A connector's folder: `config.json`, `model`, `special_tokens` and `unconditional`, all
safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.checkpoint import compare, fill_exactly, read_checked
from nexus_rt.loading.config import read_json
from nexus_rt.loading.formats.safetensors import read_header
from nexus_rt.loading.tensors import find_tensors
from nexus_rt.models.connector import TEXT_MARKERS, Connector, ConnectorConfig


def read_config(folder: Path) -> ConnectorConfig:
    """The dimensions that a connector's folder states.

    Raises:
        ModelError: no connector's folder, or a config that is none.
    """
    return ConnectorConfig.from_dict(read_json(folder / "config.json"))


def save_config(config: ConnectorConfig, folder: Path) -> None:
    """Write `config.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": "Connector", **asdict(config)}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def save_connector(
    connector: Connector, folder: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a connector folder: `config.json`, `model`, `special_tokens` and `unconditional`, all
    safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    save_config(connector.config, folder)
    own = lambda tensors: {k: v.detach().to(dtype).contiguous().clone() for k, v in tensors.items()}
    meta = {"format": "pt"}
    save_file(own(connector.state_dict()), folder / "model.safetensors", meta)
    save_file(own(connector.special_tokens), folder / "special_tokens.safetensors", meta)
    unconditional = {"text": connector.unconditional_text, "hidden": connector.unconditional_hidden}
    save_file(
        own({k: v for k, v in unconditional.items() if v is not None}),
        folder / "unconditional.safetensors",
        meta,
    )


def load_connector(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Connector:
    """Load a connector folder; each tensor goes straight from the mapped file to its place.

    Raises:
        ModelError: not a connector folder, a parameter is missing or of another shape, or a special
            token is missing.
    """
    folder, device = Path(folder), torch.device(device)
    config = read_config(folder)
    with torch.device("meta"):
        connector = Connector(config)
    stored = find_tensors(folder)
    shapes = {n: tuple(t.shape) for n, t in connector.state_dict().items()}
    compare(stored, shapes, folder, "connector")
    fill_exactly(connector, stored, dtype, device)
    rows = lambda name: dict(read_checked(read_header(folder / name), dtype, device))
    connector.special_tokens = rows("special_tokens.safetensors")
    lost = [t for t in TEXT_MARKERS if t not in connector.special_tokens]
    if lost:
        raise ModelError(
            f"{folder}/special_tokens.safetensors lacks {', '.join(lost)}; convert the checkpoint"
            " again.",
            code="missing",
        )
    name = "unconditional.safetensors"
    against = rows(name) if (folder / name).is_file() else {}
    connector.unconditional_text = against.get("text")
    connector.unconditional_hidden = against.get("hidden")
    return connector.eval()
