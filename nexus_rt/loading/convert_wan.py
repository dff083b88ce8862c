"""Wan checkpoints in their own layout, or as single files, to a folder in diffusers' layout.

    nexus-rt convert wan SRC DST

SRC is Wan's own folder (2.1, or 2.2 with `high_noise_model/` and `low_noise_model/`), or a file: a
transformer, a text encoder or a VAE, in safetensors, GGUF or a pickle, which is read without
running it; or a folder in diffusers' layout. DST holds `transformer/` (and `transformer_2/`),
`vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, as far as SRC has them, all safetensors,
`model_index.json`, and `conversion.json`, which accounts for every key. Weights of 8 bits and fewer
become bfloat16.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexus_rt.core.errors import InputError, ModelError, shorten
from nexus_rt.core.paths import as_path
from nexus_rt.loading.config import read_optional, write_json
from nexus_rt.loading.convert_parts import (
    Report,
    check_shapes,
    made_whole,
    plain,
    write_text_encoder,
    write_transformer,
    write_vae,
)
from nexus_rt.loading.experts import find_experts
from nexus_rt.loading.layouts import diffusers_name, diffusers_shapes, t5_name, vae_name
from nexus_rt.loading.locate import (
    READABLE,
    TOKENIZERS,
    VAE_FILES,
    find_text,
    find_vae,
    has_text,
    is_tokenizer,
    transformer_folder,
)
from nexus_rt.loading.names import refuse_unused, without_spare
from nexus_rt.loading.scheduler import find_scheduler
from nexus_rt.loading.tensors import find_tensors, renamed
from nexus_rt.loading.transformer import empty_transformer

SHARDS = "diffusion_pytorch_model*.safetensors*"  # of a transformer at a folder's top
T5, VAE = "encoder.block.0.layer.0.SelfAttention.q.weight", "post_quant_conv.weight"


def kind_of(source: Path) -> str:
    """What a file holds: "transformer", "text_encoder" or "vae"."""
    names = find_tensors(source)
    if any(t5_name(n) == T5 for n in names):
        return "text_encoder"
    if any(vae_name(n) == VAE for n in names) and any(n.startswith("decoder.") for n in names):
        return "vae"
    return "transformer"


def _transformer(target: Path, source: Path, label: str, report: Report) -> None:
    """A transformer's folder of a folder or file."""
    model, tensors = empty_transformer(source)
    stored = renamed(tensors, diffusers_name)
    wanted = diffusers_shapes(model)
    used = without_spare(stored, wanted, source)
    refuse_unused(used.keys() - wanted.keys(), source, "transformer")
    check_shapes(source, {k: t.shape for k, t in used.items()}, wanted)
    write_transformer(target, model.config, plain(used))
    report.add(label, len(used), unused=stored.keys() - used.keys())


def convert_wan(
    source: str | Path, target: str | Path, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Convert a Wan folder or file; see the module's text.

    Args:
        say: told which part comes next.

    Raises:
        InputError: SRC is not here, or DST exists.
        ModelError: SRC holds no part of a Wan checkpoint, or one that is damaged or of another
            task; nothing is left behind.
    """
    source, target = as_path("source", source), as_path("target", target)
    if not source.exists():
        raise InputError(
            f"{source} is not here; expected a Wan folder, or a file of weights.",
            code="not_found",
            param="source",
        )
    if source.is_file() and source.suffix not in READABLE:
        raise InputError(
            f"{source} ends in {shorten(source.suffix, 20) or 'nothing'}; expected one of"
            f" {', '.join(READABLE)}, or a folder.",
            code="unsupported",
            param="source",
        )
    with made_whole(target) as part:
        return _convert(source, part, say)


def _convert(source: Path, part: Path, say: Callable[[str], None]) -> Report:
    report = Report()
    index: dict[str, Any] = {"_class_name": "WanPipeline"}
    file = source.is_file()
    kind = kind_of(source) if file else ""
    experts = None if file else find_experts(source)
    if experts is not None:
        for name, folder in zip(("transformer", "transformer_2"), experts.folders, strict=True):
            say(f"{name} ...")
            _transformer(part / name, folder, folder.name, report)
        index["boundary_ratio"] = experts.boundary
    elif kind == "transformer" or (not file and any(transformer_folder(source).glob(SHARDS))):
        say("transformer ...")
        _transformer(part / "transformer", transformer_folder(source), source.name, report)
    vae = source if kind == "vae" else None if file else find_vae(source)
    if vae is not None:
        say("vae ...")
        write_vae(part, vae, vae.name, report)
    if kind == "text_encoder" or (not file and has_text(source)):
        say("text encoder ...")
        _text(part, source, report)
    if not report.used:
        raise ModelError(
            f"{source} holds no part of a Wan checkpoint: expected weights at the top,"
            f" high_noise_model/ and low_noise_model/, {VAE_FILES[-1]} or a umt5-xxl encoder."
        )
    _schedule(part, source, index)
    write_json(part / "model_index.json", index)
    write_json(part / "conversion.json", {"source": "wan", **vars(report)})
    return report


def _schedule(part: Path, source: Path, index: dict[str, Any]) -> None:
    """`scheduler/` and what `model_index.json` says of it, where SRC has one that is computed
    here."""
    if find_scheduler(source) is None:
        return
    (part / "scheduler").mkdir()
    shutil.copy2(source / "scheduler" / "scheduler_config.json", part / "scheduler")
    stored = read_optional(source / "model_index.json")
    index |= {k: stored[k] for k in ("scheduler",) if k in stored}


def _text(part: Path, source: Path, report: Report) -> None:
    home = source if source.is_dir() else source.parent
    tokenizer = next((home / n for n in TOKENIZERS if is_tokenizer(home / n)), None)
    weights = source if source.is_file() else find_text(source, tokenizer)[0]
    write_text_encoder(part, weights, weights.name, report)
    if tokenizer is None:
        report.notes[weights.name] = (
            "no tokenizer is beside it; pass umt5-xxl's as --tokenizer when it is used"
        )
    else:
        shutil.copytree(tokenizer, part / "tokenizer")
