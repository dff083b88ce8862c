"""transformers' models, tokenizers and processors from a local folder: complete, of the stored
weights, and only data.

transformers gives weights that are missing, foreign or of another shape random values and goes on
with a log line. Here its own loading report decides, and a folder that is not whole is refused. No
code of a folder is ever run.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.core.process import LOADING
from nexus_rt.loading.checkpoint import compare, fill_exactly, mismatch, refuse_unfit
from nexus_rt.loading.config import check_config, read_optional
from nexus_rt.loading.finite import is_finite
from nexus_rt.loading.formats.safetensors import read_header
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.names import WRAPPED, is_spare, plain_name
from nexus_rt.loading.tensors import find_tensors, fitted

REMEDY = (
    "loaded so, it would compute with random values: get the folder in transformers' own layout,"
    " unquantised"
)


def pretrained(
    class_name: str, folder: Path, what: str, device: torch.device | None = None, **options: Any
) -> Any:
    """transformers' `class_name.from_pretrained(folder)`, local files only; a model (given a
    device) goes there, complete.

    Raises:
        ModelError: a damaged folder, or weights that are missing, foreign or of other shapes;
            `what` names the part.
    """
    with LOADING:
        return _pretrained(class_name, folder, what, device, options)


def _pretrained(
    class_name: str, folder: Path, what: str, device: torch.device | None, options: dict[str, Any]
) -> Any:
    import transformers

    check_config(folder, what)
    if device is not None:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        _check_size(folder, what)
        # each pattern replaces once, and a name may have several wrappers
        wrappers = max((len(WRAPPED.findall(n)) for n in _stored_names(folder)), default=0)
        if wrappers:
            options["key_mapping"] = {f"(?:){{{i}}}{WRAPPED.pattern}": "" for i in range(wrappers)}
    loader = getattr(transformers, class_name)
    try:
        with _quiet():
            loaded = loader.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **options
            )
    except ImportError:  # a package that the class needs is not here: the caller knows which
        raise
    except (
        Exception
    ) as error:  # transformers, tokenizers and safetensors raise nearly everything on damaged files
        raise ModelError(
            f"{folder}: the {what} cannot be loaded ({shorten(error)}); download it again."
        ) from error
    if device is None:
        return loaded
    model, info = loaded
    _check_complete(model, info, folder, what)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise ModelError(
                f"{folder}: {shorten(name, 120)} of the {what} holds NaN or infinity; download it"
                " again.",
                code="not_finite",
            )
    return model.to(device).eval()


def _check_size(folder: Path, what: str) -> None:
    """Raise where config.json asks for far more parameters than the files hold: they would be made
    up."""
    config = read_optional(folder / "config.json")
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config
    number = lambda *names: next((v for n in names if isinstance(v := text.get(n), int)), 1)
    width, layers = number("hidden_size", "d_model"), number("num_hidden_layers", "num_layers")
    least = width * (number("vocab_size") + layers * number("intermediate_size", "d_ff"))
    try:
        stored = sum(
            math.prod(t.shape)
            for p in folder.glob("*.safetensors")
            for t in read_header(p, integers=True).values()
        )
    except ModelError as error:
        raise ModelError(
            f"{folder}: the {what} cannot be loaded: {error}", code=error.code, param=error.param
        ) from error
    if stored and least > 8 * stored:  # packed formats hold up to eight weights in a number
        raise ModelError(
            f"{folder}: config.json describes a {what} of at least {least:.3g} weights and the"
            f" files hold {stored:.3g}; it is not their config: download the folder again.",
            code="mismatch",
        )


def fill_whole(
    module: torch.nn.Module,
    folder: Path,
    what: str,
    dtype: torch.dtype,
    device: torch.device,
    rename: Callable[[dict[str, StoredTensor]], dict[str, StoredTensor]] = dict,
    keep_fp32: tuple[str, ...] = (),
) -> Any:
    """`module`, built on the meta device, with the weights of a transformers folder: all of them,
    and no others.

    Args:
        rename: the stored tensors under the module's names.
        keep_fp32: parts of names of weights that stay in float32.

    Raises:
        ModelError: a damaged folder, or weights that are missing, foreign or of other shapes;
            `what` names the part.
    """
    _check_size(folder, what)
    try:
        stored = rename(find_tensors(folder))
    except ModelError as error:
        raise ModelError(
            f"{folder}: the {what} cannot be loaded: {error}", code=error.code, param=error.param
        ) from error
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    used = {n: t for n, t in stored.items() if n in shapes or not is_spare(n)}
    stored = fitted(used, shapes)
    compare(stored, shapes, folder, what, REMEDY)
    fill_exactly(module, stored, dtype, device, keep_fp32)
    return module


def _check_complete(model: torch.nn.Module, info: dict[str, Any], folder: Path, what: str) -> None:
    """Raise unless every weight of the model is a stored one, and every stored weight is in the
    model or rightly spare."""
    missing = set(info.get("missing_keys", ())) | set(_untied(model, folder))
    unknown = {n for n in info.get("unexpected_keys", ()) if not is_spare(n)}
    mismatched = {mismatch(m[0], m[1], m[2]) for m in info.get("mismatched_keys", ())}
    errors = [shorten(m) for m in list(info.get("error_msgs") or ())[:2]]
    refuse_unfit(folder, what, missing, unknown, mismatched, errors, remedy=REMEDY)


def _stored_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder's safetensors."""
    return {n for path in folder.glob("*.safetensors") for n in read_header(path, integers=True)}


def _untied(model: Any, folder: Path) -> list[str]:
    """Weights that a class ties to others and the files hold once, where the loaded two differ: one
    of them was left random (transformers 5.0 to 5.2 do so with `tie_word_embeddings: false`)."""
    tied = getattr(type(model), "_tied_weights_keys", None) or {}
    base = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    stored = {plain_name(n) for n in _stored_names(folder)}
    places = dict(model.named_parameters(remove_duplicate=False))
    lost = []
    for name in tied:
        source = places.get(tied[name]) if isinstance(tied, dict) else getattr(base, "weight", None)
        place = places.get(name)
        if place is None or source is None or any(s.endswith(name) for s in stored):
            continue
        if place.shape != source.shape or not (
            place.data_ptr() == source.data_ptr() or torch.equal(place, source)
        ):
            lost.append(name)
    return lost


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load report: what it says is an error here, or of no concern. A filter
    and no level: with its level raised, transformers checks tensor-parallel plans and says so."""
    drop = lambda record: "LOAD REPORT" not in record.getMessage()
    logs = [
        logging.getLogger(f"transformers.{name}")
        for name in ("modeling_utils", "utils.loading_report")
    ]
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    if shown:
        bars.disable_progress_bar()
    for log in logs:
        log.addFilter(drop)
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        for log in logs:
            log.removeFilter(drop)
