"""Where a model is: a folder here or a hub id, its JSON files, and what identifies its weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nexus_rt.core.documents import read_object
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.core.paths import as_path

PLAIN = (".safetensors", ".sft", ".gguf")  # files of weights that are data alone
READABLE = (*PLAIN, ".bin", ".pt", ".pth", ".ckpt")
OTHERS = {  # of files that are no weights of ours -> what to do
    ".onnx": "an ONNX graph; pass the folder that `nexus-rt export` made to --engines",
    ".engine": "a TensorRT engine; pass the folder that `nexus-rt export` made to --engines",
    ".plan": "a TensorRT engine; pass the folder that `nexus-rt export` made to --engines",
    ".pt2": "an AOTInductor package; pass the folder that `nexus-rt export` made to --engines",
    ".json": "a JSON file; pass the folder it lies in",
    ".zip": "an archive; unpack it first",
    ".tar": "an archive; unpack it first",
    ".gz": "an archive; unpack it first",
    ".pkl": "a pickle; pass safetensors, or `nexus-rt convert` it",
}


def resolve(
    source: str | Path,
    subfolders: tuple[str, ...],
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> Path:
    """A local folder or file of weights for `source`: itself if it is here, else a snapshot of the
    hub repository of that id.

    Of a repository only json files and the named subfolders are fetched, never pickles.

    Raises:
        ModelError: neither a folder, nor a file of weights, nor a repository that can be reached.
    """
    path = as_path("source", source)
    if path.is_dir():
        return path
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in READABLE:
            what = OTHERS.get(suffix, f"a file that ends in {shorten(suffix, 20) or 'nothing'}")
            raise ModelError(
                f"{source} is {what}; expected weights ({', '.join(READABLE)}) or a folder of"
                " them.",
                code="unsupported",
                param="source",
            )
        return path
    if suffix in READABLE or suffix in OTHERS:
        raise ModelError(
            f"{source} is the name of a file, and none is here; check the path, or pass a folder.",
            code="not_found",
            param="source",
        )
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ModelError(
            f"{source} is not a folder or file here; expected a model's, or a hub id such as"
            " 'owner/name'.",
            code="not_found",
            param="source",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", *(f"{s}/*" for s in subfolders)]
    if "transformer" in subfolders:
        # Wan's own layout keeps the transformer at the top
        patterns.append("diffusion_pytorch_model*")
    try:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt"],
            )
        )
    except (OSError, HFValidationError, ValueError) as error:  # the hub's errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{source} is neither a folder here nor a repository that could be fetched ({reason}); "
            "check the spelling, the connection, or pass a local folder.",
            code="not_found",
            param="source",
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object, or a `ModelError` that names the file."""
    if not path.is_file():
        raise ModelError(
            f"{path.parent} is not a model folder: it has no {path.name}.", code="not_found"
        )
    return read_object(path)


def warn_unread(config: Mapping[str, Any], known: Collection[str], where: Path) -> None:
    """Warn of a config's fields that are set and that nothing here reads."""
    strange = [f for f, v in config.items() if not f.startswith("_") and f not in known and v]
    if strange:
        warnings.warn(
            f"{where}: fields that are not read here: {shorten(', '.join(strange), 120)}; the"
            f" model of"
            " a fork may compute another clip with them.",
            stacklevel=3,
        )


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
