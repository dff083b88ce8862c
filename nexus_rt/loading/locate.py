"""Which files of a folder here hold which part of a checkpoint, by the names that publishers use:
in diffusers' layout, in Wan's own, or as single files.

Files alone: their tensors are `nexus_rt.loading.tensors`', and how a hub id becomes a folder is
`nexus_rt.loading.source`'s.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.formats.safetensors import read_header

PLAIN = (".safetensors", ".sft", ".gguf")  # files of weights that are data alone
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READABLE = (*PLAIN, *PICKLES[:-1])  # a .pkl may hold anything
VAE_FILES = (  # by Wan, Comfy-Org and Kijai
    "Wan2.1_VAE.safetensors",
    "wan_2.1_vae.safetensors",
    "Wan2_1_VAE_fp32.safetensors",
    "Wan2_1_VAE_bf16.safetensors",
    "Wan2.1_VAE.pth",
)
TEXT_FILES = (
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "umt5_xxl_fp16.safetensors",
    "umt5-xxl-enc-bf16.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
TOKENIZERS = ("tokenizer", "google/umt5-xxl", "umt5-xxl", "umt5_xxl_tokenizer")


def weights_of(source: Path) -> list[Path]:
    """The files of weights in a folder, or a file itself."""
    if source.is_file():
        return [source]
    return sorted(p for p in source.glob("*") if p.suffix in PLAIN)


def folder_bytes(source: Path) -> int:
    """Bytes of the weights stored in a folder or file."""
    return sum(p.stat().st_size for p in weights_of(source))


def folder_fingerprint(source: Path) -> str:
    """A short hash of a folder's weight files, or a file: names, sizes, and the first and last MiB
    of each."""
    digest = hashlib.sha256()
    for path in weights_of(source):
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + head + file.read())
    return digest.hexdigest()[:16]


def require_safetensors(folder: Path) -> None:
    """Raise a `ModelError` where a transformers folder has no safetensors."""
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no safetensors; convert its weights (pickles are not read here).",
            code="missing",
        )


def weight_files(source: Path) -> list[Path]:
    """The files that hold a model's weights: a file itself; of a folder the published names, an
    index and its shards, or the only file of a kind that is read.

    Raises:
        ModelError: none, only pickles (which have to be named), or several of which none is
            published under that name.
    """
    if source.is_file():
        return [source]
    for name in WEIGHT_NAMES:
        for variant in ("", ".fp16", ".bf16"):
            for file in (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors"):
                if (source / file).is_file():
                    return [source / file]
    several = weights_of(source)
    if len(several) > 1:
        raise ModelError(
            f"{source} holds {len(several)} files of weights"
            f" ({shorten(', '.join(p.name for p in several[:3]))}, ...) and no index; name the"
            f" one to"
            f" read: {several[0]}."
        )
    if several:
        return several
    pickled = sorted(p.name for e in PICKLES for p in source.glob(f"*{e}"))
    if pickled:
        raise ModelError(
            f"{source} holds only pickled weights ({', '.join(pickled[:3])}), which can run code"
            " when read; name the file, which is then read without running it, or convert the"
            " checkpoint first (`nexus-rt convert`).",
            code="unsafe",
        )
    raise ModelError(
        f"{source} holds no weights: expected {WEIGHT_NAMES[0]}.safetensors or its index of"
        " shards.",
        code="missing" if source.exists() else "not_found",
    )


def _named(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / n for n in names if (folder / n).is_file()), None)


def transformer_folder(source: Path) -> Path:
    """The transformer inside a pipeline folder, or the folder or file itself."""
    inner = source / "transformer"
    return inner if inner.is_dir() and source.is_dir() else source


def find_vae(source: Path) -> Path | None:
    """The VAE in a pipeline's folder: `vae/`, or a file of Wan's own layout; None where there is
    none."""
    inner = source / "vae"
    return inner if (inner / "config.json").is_file() else _named(source, VAE_FILES)


def given_vae(source: Path) -> Path:
    """The VAE that a folder or file names."""
    return source if source.is_file() else find_vae(source) or source


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(
        (folder / n).is_file() for n in ("tokenizer_config.json", "tokenizer.json", "spiece.model")
    )


def has_text(source: Path) -> bool:
    """Whether a pipeline's folder has a text encoder, in either layout."""
    return (source / "text_encoder").is_dir() or _named(source, TEXT_FILES) is not None


def find_text(source: Path, tokenizer: Path | None = None) -> tuple[Path, Path]:
    """A text encoder's weights, folder or file, and its tokenizer's folder (or a file that carries
    one).

    Args:
        source: a folder with `text_encoder/` and `tokenizer/`, Wan's own folder, or a file.
        tokenizer: its folder, where it is not beside the weights.

    Raises:
        ModelError: either is not there; says where it was looked for.
    """
    if source.is_file():
        weights: Path | None = source
    elif (source / "text_encoder").is_dir():
        weights = source / "text_encoder"
    else:
        weights = _named(source, TEXT_FILES)
        if weights is None and tokenizer is not None and _holds_model(source):
            weights = source
    if weights is None or (weights.is_dir() and not _holds_model(weights)):
        raise ModelError(
            f"{source} has no text_encoder/config.json; expected a folder with text_encoder/ and"
            f" tokenizer/, or a file such as {TEXT_FILES[0]}.",
            code="missing",
            param="text_encoder",
        )
    if tokenizer is not None:
        inner = tokenizer / "tokenizer"
        found = inner if inner.is_dir() and is_tokenizer(inner) else tokenizer
        if found.is_dir() and not is_tokenizer(found):
            raise ModelError(
                f"{tokenizer} is no tokenizer's folder: it has neither tokenizer_config.json nor"
                " tokenizer.json.",
                param="tokenizer",
            )
        return weights, found
    home = source if source.is_dir() else source.parent
    for name in TOKENIZERS:
        if is_tokenizer(home / name):
            return weights, home / name
    # a sentencepiece model among the tensors, as ComfyUI's files have
    carries = weights.is_file() and weights.suffix == ".safetensors"
    if carries and "spiece_model" in read_header(weights, integers=True):
        return weights, weights
    if source.is_dir() and (source / "text_encoder").is_dir():
        raise ModelError(
            f"{source} has no tokenizer/tokenizer_config.json; expected a folder with text_encoder/"
            " and tokenizer/, or the tokenizer's folder as tokenizer=.",
            code="missing",
            param="tokenizer",
        )
    raise ModelError(
        f"no tokenizer is beside {weights} (looked for {', '.join(TOKENIZERS)}); pass the folder of"
        " umt5-xxl's as tokenizer= (--tokenizer).",
        code="missing",
        param="tokenizer",
    )


def _holds_model(folder: Path) -> bool:
    weights = any(p.suffix in READABLE for p in folder.iterdir())
    return (folder / "config.json").is_file() or weights
