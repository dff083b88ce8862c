"""`nexus-rt export`: from a model's folder to an engine folder that has proved itself.

Engines are built in the cache, in a folder named by what they are made of and for, under a lock: a
second process that wants the same engine waits and takes it, an interrupted build goes on after the
last artefact it finished, and nothing appears under its name before it is complete and compared.
The result is then linked to where it was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nexus_rt import __version__
from nexus_rt.core.errors import InputError, ModelError, NexusError, choose
from nexus_rt.core.paths import check_folder, failed_file
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.exported_engine import DTYPES
from nexus_rt.engines.folder import EngineFolder, engines_root, files_of, link_tree
from nexus_rt.engines.manifest import Manifest
from nexus_rt.engines.publish import publish, remove
from nexus_rt.engines.registry import engine_of
from nexus_rt.export.components import Component, weights_bytes, weights_hash
from nexus_rt.export.contract import contract
from nexus_rt.export.parity import gate
from nexus_rt.loading.config import write_json
from nexus_rt.memory.offload import release

BUILDERS = {  # backend -> the module that builds its engines, imported when it is needed
    "onnx": "nexus_rt.export.onnx",
    "aoti": "nexus_rt.export.aoti",
    "tensorrt": "nexus_rt.export.tensorrt",
    "tensorrt-rtx": "nexus_rt.export.tensorrt",
}


@dataclass(frozen=True)
class Target:
    """What to build, and for what.

    device: where it is built, and for onnx and aoti where it will run. opset: of the ONNX graph.
    sm: the compute capability to build for, of tensorrt-rtx (None: all it knows). weight_streaming,
        refit: of the TensorRTs.
    range: the buckets are the two ends of a range, and any size between them will do.
    """

    backend: str
    precision: str
    buckets: tuple[ClipSize, ...]
    device: torch.device
    opset: int = 23
    sm: str | None = None
    weight_streaming: bool = False
    refit: bool = False
    range: bool = False

    def ordered(self) -> list[ClipSize]:
        """The sizes once each, in the manifest's order."""
        return sorted(set(self.buckets))

    def builder(self) -> ModuleType:
        """The module that builds for the backend.

        Raises:
            InputError: an unknown backend or precision, no sizes, or no builder that can run here;
                raised before any work.
        """
        choose("backend", self.backend, BUILDERS)
        choose("precision", self.precision, DTYPES)
        if not self.buckets:
            raise InputError(
                "no sizes to export for; pass --sizes, such as 832x480x81.",
                code="missing",
                param="sizes",
            )
        if self.precision == "int8" and (self.backend, self.device.type) != ("onnx", "cpu"):
            raise InputError(
                "int8 engines are ONNX Runtime's on a CPU, which multiplies int8 there: pass"
                " --backend onnx --device cpu, or another --precision.",
                code="conflict",
                param="precision",
            )
        module = importlib.import_module(BUILDERS[self.backend])
        try:
            module.check_target(self)
        except InputError as error:
            raise InputError(
                f"no {self.backend} engine can be built here: {error}",
                code=error.code,
                param=error.param,
            ) from None
        return module


def export_component(
    part: Component, target: Target, command: str, say: Callable[[str], None] = lambda text: None
) -> EngineFolder:
    """Build, or find in the cache, the engine of a part.

    Args:
        command: what rebuilds it, for the manifest. say: called with a line for every stage.

    Returns:
        The folder in the cache; its manifest's "parity" says whether it passed.

    Raises:
        InputError: the target cannot be built here, or the cache has no room for it or cannot be
            written; raised before any work.
        ModelError: the source is no model, the engine failed its parity gate (it is kept aside), or
            the disk filled up.
    """
    name, target = part.name, replace(target, precision=part.precision(target.precision))
    builder = target.builder()
    architecture = part.architecture()
    say(f"{name}: reading {part.folder}")
    options = (
        {k: True for k in ("weight_streaming", "refit", "range") if getattr(target, k)}
        if part.sized
        else {}
    )
    manifest = Manifest(
        part=name,
        backend=target.backend,
        backend_version=builder.version(target),
        precision=target.precision,
        architecture=architecture,
        weights=weights_hash(part.folder),
        buckets=[list(b) for b in target.ordered()] if part.sized else [],
        graphs=part.graphs(),
        device=builder.built_for(target),
        producer=f"nexus-rt {__version__}",
        command=command,
        opset=target.opset if target.backend == "onnx" else None,
        lora=part.merged(),
        options={
            **options,
            **part.options(),
            **(builder.options(target) if hasattr(builder, "options") else {}),
        },
    )
    check_folder(engines_root(), "set NEXUS_RT_CACHE to a folder that you may write to")
    final = engines_root() / manifest.identity()
    with _locked(
        final.with_suffix(".lock"),
        lambda: say(f"{name}: another process builds this engine; waiting for it"),
    ):
        if (done := _finished(final)) is not None:
            say(f"{name}: found in the cache, {final}")
            if done.manifest.parity.get("compared", True) or not builder.can_run():
                return done
            os.rename(final, final.with_suffix(".part"))  # built without a GPU, which is here now
            return _compared(
                part, final.with_suffix(".part"), final, done.manifest, target, builder, say
            )
        work = final.with_suffix(".part")
        work.mkdir(parents=True, exist_ok=True)
        # stored in half?
        need = int(weights_bytes(part.folder) * (2 if target.precision == "fp32" else 1.1)) + (
            1 << 20
        )
        try:
            _room(work, need)
            _artefacts(part, work, target, builder, say)
            return _compared(part, work, final, manifest, target, builder, say)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ModelError(
                    f"{name}: {failed_file(str(error.filename or work), error)}",
                    code="not_writable",
                ) from error
            shutil.rmtree(work, ignore_errors=True)
            raise ModelError(
                f"the disk under {work.parent} filled up: this engine takes about {need / 1e9:.1f}"
                " GB; nothing was left behind. Make room, or set NEXUS_RT_CACHE to another disk.",
                code="not_writable",
            ) from error


def _finished(final: Path) -> EngineFolder | None:
    """The engine in the cache, if it is whole; a damaged one is removed."""
    if not final.is_dir():
        final.unlink(missing_ok=True)  # a link to an output folder that has gone
        return None
    try:
        existing = EngineFolder.read(final)
        # what is handed out is read: a damaged file may have kept its time
        existing.verify(again=True)
        return existing
    except ModelError:
        remove(final)
        return None


def _room(work: Path, need: int) -> None:
    free = shutil.disk_usage(work).free
    if free < need:
        raise InputError(
            f"{work.parent} has {free / 1e9:.1f} GB free and this engine takes about"
            f" {need / 1e9:.1f} GB; make room, or set NEXUS_RT_CACHE to another disk.",
            code="not_writable",
        )


@contextlib.contextmanager
def _locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """One builder an engine, over processes; the lock goes with the process that holds it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _artefacts(
    part: Component, work: Path, target: Target, builder: ModuleType, say: Callable[[str], None]
) -> None:
    """Every graph's artefact, those of an interrupted build kept: each is built aside and moved in
    when it is complete."""
    marks = work / ".complete"
    marks.mkdir(exist_ok=True)
    todo = [g for g in part.graphs() if not (marks / g).exists()]
    if not todo:
        return
    aside, name = work / ".building", part.name
    say(f"{name}: tracing")
    try:
        traced = part.trace(
            target.precision,
            target.ordered() if part.sized else [],
            target.device,
            _kernels(target),
        )
    except NexusError:
        raise
    except Exception as error:  # PyTorch's exporter raises nearly everything
        raise ModelError(
            f"{name}: it cannot be traced: {_first_line(error)}", code="unsupported"
        ) from error
    (marks / "contract.json").write_text(json.dumps({g: contract(t) for g, t in traced.items()}))
    for graph in todo:
        say(f"{name}: building {graph} ({target.backend}, {target.precision})")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            builder.build(graph, traced[graph], aside, target)
        except (NexusError, OSError):
            raise
        except Exception as error:  # onnx's ValidationError and InferenceError are no RuntimeErrors
            raise ModelError(
                f"{name}: the {graph} graph could not be built for {target.backend}:"
                f" {_first_line(error)}",
                code="unsupported",
            ) from error
        for file in aside.iterdir():
            os.replace(file, work / file.name)
        (marks / graph).touch()
    shutil.rmtree(aside, ignore_errors=True)
    for each in traced.values():
        each.forget()
    del traced
    release(target.device)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:600]


def _kernels(target: Target) -> tuple[str, str]:
    """Our kernels travel inside AOTInductor's code on a GPU; ONNX has only what its operators
    say."""
    if target.backend == "aoti" and target.device.type == "cuda":
        # before 2.13 the scratch in which a kernel builds its descriptors is allocated for one
        # block only
        return "triton", (
            "triton" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else "sdpa"
        )
    return "torch", "auto"


def _compared(
    part: Component,
    work: Path,
    final: Path,
    manifest: Manifest,
    target: Target,
    builder: ModuleType,
    say: Callable[[str], None],
) -> EngineFolder:
    """Pass the engine through the gate and give it its name, or put it aside; name it uncompared
    where it cannot run."""
    name = part.name
    if (described := work / ".complete" / "contract.json").is_file():
        manifest = replace(manifest, contract=json.loads(described.read_text()))
    shutil.rmtree(work / ".complete", ignore_errors=True)
    manifest = replace(manifest, files=files_of(work))
    if not builder.can_run():
        say(
            f"{name}: built; it cannot run here and was not compared: run the same command where"
            " it can"
        )
        why = "it was built where it cannot run and never compared; run the same command on its GPU"
        parity = {"passed": False, "compared": False, "why": why, "rows": {}}
        EngineFolder(work, replace(manifest, parity=parity)).write()
        os.rename(work, final)
        return EngineFolder.read(final)
    say(f"{name}: comparing with PyTorch in float32")
    runs_on = torch.device("cuda") if manifest.device["type"] == "cuda" else target.device
    engine = engine_of(EngineFolder(work, manifest), runs_on)
    parity = gate(part, engine, target.ordered(), target.precision, runs_on)
    engine.unload()
    done = EngineFolder(work, replace(manifest, parity=parity))
    done.write()
    where = final if parity["passed"] else final.with_suffix(".failed")
    if where.exists():
        shutil.rmtree(where)
    os.rename(work, where)
    if not parity["passed"]:
        raise ModelError(
            f"the {name} engine is not the model it was made of: {parity['why']}. It is kept in"
            f" {where}, and is not loaded unless you force it; try another precision.",
            code="parity",
        )
    return EngineFolder(where, done.manifest)


def export_components(
    parts: list[Component],
    beside: dict[str, Path],
    index: Path | dict[str, Any] | None,
    target: Target,
    output: Path,
    command: str,
    say: Callable[[str], None] = lambda text: None,
    lasting: bool = True,
) -> dict[str, EngineFolder]:
    """Export parts of a pair into a folder that `NexusPipeline.from_engines` loads by itself.

    Args:
        beside: the pair's other parts -> folder, linked beside the engines. index: the pair's
            `model_index.json`, or what it would say, for its defaults.
        lasting: False for a folder that soon goes away: the engines stay in the cache and are
            linked there.
        output: the folder to make; engines that it holds already are replaced, and each appears
            only when complete.

    Raises:
        InputError, ModelError: as `export_component`.
    """
    for part in parts:
        replace(target, precision=part.precision(target.precision)).builder()
    check_folder(output, "choose a folder that you may write to")
    # one that fails leaves the output as it was
    engines = [export_component(part, target, command, say) for part in parts]
    built = {}
    try:
        with _locked(
            output / ".export.lock", lambda: say(f"another process writes {output}; waiting for it")
        ):
            for part, engine in zip(parts, engines, strict=True):
                built[part.name] = publish(
                    engine, output / part.name, part.name, command, say, lasting
                )
            for name, source in beside.items():
                if not (output / name).exists():
                    link_tree(source, output / name)
            if isinstance(index, Path):
                shutil.copy2(index, output / "model_index.json")
            elif index is not None:
                write_json(output / "model_index.json", index)
        (output / ".export.lock").unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"{failed_file(str(output), error)} The engines are kept in {engines_root()}: the same"
            " command goes on.",
            code="not_writable",
        ) from error
    return built
