"""Where a model is: a folder here or a hub id, its JSON files, and what identifies its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nexus_rt.documents import read_object
from nexus_rt.errors import ModelError

FILES = (
    ".safetensors",
    ".gguf",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".onnx",
    ".json",
    ".zip",
    ".tar",
)


def resolve(
    source: str | Path,
    subfolders: tuple[str, ...],
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> Path:
    """A local folder for `source`: itself if it is one, else a snapshot of the hub repository of
    that id.

    Of a repository only json files and the named subfolders are fetched, never pickles.

    Raises:
        ModelError: neither a folder nor a repository that can be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.suffix.lower() in FILES:
        raise ModelError(
            f"{source} is {'a file' if path.is_file() else 'the name of a file, and none is here'};"
            " single files are not read: pass a folder with config.json and safetensors, in"
            " diffusers' or Wan's own layout."
        )
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ModelError(
            f"{source} is not a folder; expected a model folder or a hub id such as 'owner/name'."
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
            "check the spelling, the connection, or pass a local folder."
        ) from error


def read_json(path: Path) -> dict:
    """A JSON object, or a `ModelError` that names the file."""
    if not path.is_file():
        raise ModelError(f"{path.parent} is not a model folder: it has no {path.name}.")
    return read_object(path)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights stored in a folder."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def folder_fingerprint(folder: Path) -> str:
    """A short hash of a folder's weight files: names, sizes, and the first and last MiB of each."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + head + file.read())
    return digest.hexdigest()[:16]


def require_safetensors(folder: Path) -> None:
    """Raise a `ModelError` where a transformers folder has no safetensors."""
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no safetensors; convert its weights (pickles are not read here)."
        )
