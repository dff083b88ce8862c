"""From what a caller names, a folder, a file of weights or a hub id, to a path on this machine.

The path alone: what lies there is `nexus_rt.loading.locate`'s.
"""

from __future__ import annotations

from pathlib import Path

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.core.paths import as_path
from nexus_rt.loading.locate import READABLE

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
