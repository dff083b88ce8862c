"""Finding models: a folder in diffusers' or Wan's own layout, or a hub id, to a transformer on a
device."""

from __future__ import annotations

import gc
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nexus_rt.attention import NAMES
from nexus_rt.documents import read_object
from nexus_rt.errors import ModelError, choose
from nexus_rt.models.checkpoint import StoredTensor, diffusers_shapes, fill, find_tensors
from nexus_rt.models.lora import Changes, Lora
from nexus_rt.models.wan import WanConfig, WanTransformer
from nexus_rt.ops import choose_ops

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


def release(device: torch.device) -> None:
    """Give back the memory of a model just dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def transformer_folder(folder: Path) -> Path:
    """The transformer inside a pipeline folder, or the folder itself."""
    inner = folder / "transformer"
    return inner if (inner / "config.json").is_file() else folder


def load_config(folder: Path) -> WanConfig:
    """The architecture in a transformer folder's `config.json`."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name", "WanModel")
    if name not in ("WanTransformer3DModel", "WanModel"):
        raise ModelError(
            f"{folder} holds a {name}; expected a WanTransformer3DModel (or Wan's own WanModel)."
        )
    return WanConfig.from_dict(config)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most of a transformer's weights are stored in; bfloat16 for those of 8
    bits."""
    counts: dict[torch.dtype, int] = {}
    for tensor in find_tensors(transformer_folder(folder)).values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    found = max(counts, key=counts.__getitem__)
    return torch.bfloat16 if found.itemsize == 1 else found


def _check_depth(config: WanConfig, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """Raise where the config asks for many more blocks than the weights have, before modules are
    built for it."""
    blocks = {
        int(m[1]) for name in tensors if (m := re.search(r"(?:^|\.)blocks\.(\d{1,6})\.", name))
    }
    if config.num_layers > 2 * len(blocks) + 16:
        raise ModelError(
            f"{folder}: the checkpoint is not this architecture: its weights have {len(blocks)}"
            f" blocks and config.json asks for {config.num_layers}; check config.json against the"
            " weights."
        )


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    kernels: str = "auto",
    attention: str = "auto",
    loras: Sequence[Lora] = (),
) -> WanTransformer:
    """Load a Wan T2V transformer from a folder in diffusers' or Wan's own layout.

    Peak memory is the model in `dtype` plus one stored tensor (and a LoRA's file). `kernels`,
    `attention`: see `WanTransformer.use_kernels`; `loras` are added to the stored weights in
    float32, and the sum rounded to `dtype` once.

    Raises:
        InputError: kernels that cannot run on the device; said before anything is read.
        ModelError: not a model folder, another architecture, a missing shard, a damaged file,
            pickles only, a LoRA that does not fit.
    """
    choose_ops(kernels, torch.device(device))
    choose("attention backend", attention, NAMES)
    folder = transformer_folder(Path(folder))
    config = load_config(folder)
    tensors = find_tensors(folder)
    _check_depth(config, tensors, folder)
    with torch.device("meta"):
        model = WanTransformer(config)
    changes = Changes(loras, diffusers_shapes(model))
    fill(model, tensors, dtype, torch.device(device), changes.apply if changes else None)
    return model.use_kernels(kernels, attention).eval()
