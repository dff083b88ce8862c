"""A VAE's folder or file to its config, its latent space and its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.architecture import wan_vae_config
from nexus_rt.loading.checkpoint import compare
from nexus_rt.loading.config import check_config, read_json, warn_unread
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.layouts import vae_name
from nexus_rt.loading.tensors import find_tensors, fitted, renamed
from nexus_rt.models.wan_vae import (
    FIELDS,
    LATENT_FIELDS,
    WAN_VAE,
    Blocks,
    WanVae,
    check_space,
    is_plain,
)


def vae_config(source: Path) -> dict[str, Any]:
    """A VAE's config: of its folder, or what its tensors' shapes say.

    Raises:
        ModelError: no folder or file of a Wan VAE.
    """
    if source.is_dir():
        return read_json(source / "config.json")
    stored = renamed(find_tensors(source), vae_name)
    return wan_vae_config({n: t.shape for n, t in stored.items()}, source)


def vae_space(source: Path) -> dict[str, Any]:
    """What of a VAE's config defines its latent space."""
    config = vae_config(source)
    space = {field: config.get(field, WAN_VAE[field]) for field in LATENT_FIELDS}
    check_space(space, f"{source}/config.json" if source.is_dir() else str(source))
    return space


def diffusers_vae(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(config)


def empty_vae(source: Path) -> tuple[torch.nn.Module, dict[str, StoredTensor]]:
    """A VAE's module on the meta device, and the stored tensors, which are exactly its own.

    Raises:
        ModelError: no folder or file of a Wan VAE, or weights that are missing, foreign or of other
            shapes.
    """
    if source.is_dir():
        check_config(source, "VAE")
    config = vae_config(source)
    warn_unread(config, FIELDS, source / "config.json")
    known = {k: v for k, v in config.items() if k in Blocks.__struct_fields__}
    remedy = "it is no AutoencoderKLWan's: get it again"
    documents.check(known, Blocks, f"{source}/config.json", remedy=remedy)
    if config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
        raise ModelError(
            f"{source} holds a {shorten(config['_class_name'], 80)}; expected an AutoencoderKLWan.",
            code="unsupported",
            param="_class_name",
        )
    try:
        with torch.device("meta"):
            model = WanVae(config) if is_plain(config) else diffusers_vae(config)
    except Exception as error:  # diffusers checks no value of a config
        raise ModelError(
            f"{source}/config.json is no AutoencoderKLWan's ({shorten(error)}); get it again."
        ) from error
    try:
        stored = renamed(find_tensors(source), vae_name)
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        stored = fitted(stored, shapes)
        compare(stored, shapes, source, "VAE")
    except ModelError as error:
        raise ModelError(
            f"{source}: the VAE cannot be loaded: {error}",
            code=error.code,
            param=error.param,
        ) from error
    return model, stored
