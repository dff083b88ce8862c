"""`nexus-rt export`: from a generator's folder to an engine folder that has proved itself.

Engines are built in the cache, in a folder named by what they are made of and for, under a lock: a second process that
wants the same engine waits and takes it, an interrupted build goes on after the last artefact it finished, and nothing
appears under its name before it is complete and compared. The result is then linked to where it was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from nexus_rt import __version__
from nexus_rt.engines.exported import DTYPES, GRAPHS, Bucket
from nexus_rt.engines.folder import EngineFolder, Manifest, engines_root, files_of, link_tree, trusted_hash
from nexus_rt.engines.open import engine_of
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.errors import InputError, ModelError, choose
from nexus_rt.export.graph import trace
from nexus_rt.export.parity import gate
from nexus_rt.models import load

BUILDERS = {"onnx": "onnx", "aoti": "aoti", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}  # backend -> module
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Target:
    """What to build, and for what.

    device: where it is built, and for onnx and aoti where it will run. opset: of the ONNX graph. sm: the compute
    capability to build for, of tensorrt-rtx (None: all it knows). weight_streaming, refit: of the TensorRTs.
    """

    backend: str
    precision: str
    buckets: tuple[Bucket, ...]
    device: torch.device
    opset: int = 23
    sm: str | None = None
    weight_streaming: bool = False
    refit: bool = False

    def ordered(self) -> list[Bucket]:
        """The sizes once each, in the manifest's order."""
        return sorted(set(self.buckets))

    def builder(self) -> ModuleType:
        """The module that builds for the backend.

        Raises:
            InputError: an unknown backend or precision, no sizes, or no builder that can run here; said before any work.
        """
        choose("backend", self.backend, BUILDERS)
        choose("precision", self.precision, DTYPES)
        if not self.buckets:
            raise InputError("no sizes to export for; pass --sizes, such as 832x480x81.")
        module = importlib.import_module(f"nexus_rt.export.{BUILDERS[self.backend]}")
        if why := module.cannot_build(self):
            raise InputError(f"no {self.backend} engine can be built here: {why}.")
        return module


def weights_hash(folder: Path) -> str:
    """One hash of a transformer folder's weight files, by name and content."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHTS]
    if not files:
        raise ModelError(f"{folder} holds no weights ({', '.join(WEIGHTS)}); expected a transformer's folder.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {trusted_hash(path)}\n".encode())
    return digest.hexdigest()


def export_generator(
    name: str, source: str | Path, target: Target, command: str, say: Callable[[str], None] = lambda text: None
) -> EngineFolder:  # fmt: skip
    """Build, or find in the cache, the engine of one generator.

    Args:
        name: "small" or "large". source: a folder with its weights. command: what rebuilds it, for the manifest.
        say: called with a line for every stage.

    Returns:
        The folder in the cache; its manifest's "parity" says whether it passed.

    Raises:
        InputError: the target cannot be built here, or the disk has no room for it; said before any work.
        ModelError: the source is no model, the engine failed its parity gate (it is kept aside), or the disk filled up.
    """
    builder = target.builder()
    folder = load.transformer_folder(Path(source))
    config = load.load_config(folder)
    say(f"{name}: reading {folder}")
    manifest = Manifest(
        generator=name, backend=target.backend, backend_version=builder.version(target), precision=target.precision,
        architecture=json.loads(json.dumps(asdict(config))), weights=weights_hash(folder),
        buckets=[list(b) for b in target.ordered()], device=builder.built_for(target), producer=f"nexus-rt {__version__}",
        command=command, opset=target.opset if target.backend == "onnx" else None,
        options={k: True for k in ("weight_streaming", "refit") if getattr(target, k)},
    )  # fmt: skip
    final = engines_root() / manifest.identity()
    with _locked(final.with_suffix(".lock"), lambda: say(f"{name}: another process builds this engine; waiting for it")):
        if (done := _finished(final)) is not None:
            say(f"{name}: found in the cache, {final}")
            if done.manifest.parity.get("compared", True) or not builder.can_run():
                return done
            os.rename(final, final.with_suffix(".part"))  # built without a GPU, which is here now
            return _compared(name, folder, final.with_suffix(".part"), final, done.manifest, target, builder, say)
        part = final.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        need = _bytes_needed(folder, target.precision)
        try:
            _room(part, need)
            _artefacts(name, folder, part, target, builder, say)
            return _compared(name, folder, part, final, manifest, target, builder, say)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.rmtree(part, ignore_errors=True)
            raise ModelError(
                f"the disk under {part.parent} filled up: this engine takes about {need / 1e9:.1f} GB; nothing was left "
                "behind. Make room, or set NEXUS_RT_CACHE to another disk."
            ) from error


def _finished(final: Path) -> EngineFolder | None:
    """The engine in the cache, if it is whole; a damaged one is removed."""
    if not final.is_dir():
        return None
    try:
        found = EngineFolder.read(final)
        found.verify()
        return found
    except ModelError:
        shutil.rmtree(final)
        return None


def _bytes_needed(folder: Path, precision: str) -> int:
    stored = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in WEIGHTS)
    return int(stored * (2 if precision == "fp32" else 1.1)) + (1 << 20)  # stored in half precision, written in float32


def _room(part: Path, need: int) -> None:
    free = shutil.disk_usage(part).free
    if free < need:
        raise InputError(
            f"{part.parent} has {free / 1e9:.1f} GB free and this engine takes about {need / 1e9:.1f} GB; make room, or set "
            "NEXUS_RT_CACHE to another disk."
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


def _artefacts(name: str, folder: Path, part: Path, target: Target, builder: ModuleType, say: Callable[[str], None]) -> None:
    """Every graph's artefact, those of an interrupted build kept: each is built aside and moved in when it is complete."""
    marks = part / ".complete"
    marks.mkdir(exist_ok=True)
    todo = [g for g in GRAPHS if not (marks / g).exists()]
    if not todo:
        return
    aside = part / ".building"
    say(f"{name}: tracing")
    model = load.load_transformer(folder, DTYPES[target.precision], target.device, *_kernels(target))
    traced = trace(model, target.ordered())
    for graph in todo:
        say(f"{name}: building {graph} ({target.backend}, {target.precision})")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            builder.build(graph, traced[graph], aside, target)
        except (RuntimeError, ValueError) as error:
            said = (str(error).strip() or "no message").splitlines()[0][:600]
            raise ModelError(f"{name}: the {graph} graph could not be built for {target.backend}: {said}") from error
        for file in aside.iterdir():
            os.replace(file, part / file.name)
        (marks / graph).touch()
    shutil.rmtree(aside, ignore_errors=True)
    del model, traced
    load.release(target.device)


def _kernels(target: Target) -> tuple[str, str]:
    """Our kernels travel inside AOTInductor's code on a GPU; ONNX has only what its operators say."""
    if target.backend == "aoti" and target.device.type == "cuda":
        return "triton", "triton"
    return "torch", "auto"


def _compared(
    name: str, folder: Path, part: Path, final: Path, manifest: Manifest, target: Target, builder: ModuleType,
    say: Callable[[str], None],
) -> EngineFolder:  # fmt: skip
    """Pass the engine through the gate and give it its name, or put it aside; name it uncompared where it cannot run."""
    shutil.rmtree(part / ".complete", ignore_errors=True)
    manifest = replace(manifest, files=files_of(part))
    if not builder.can_run():
        say(f"{name}: built; it cannot run here and was not compared: run the same command where it can")
        why = "it was built where it cannot run and never compared; run the same command on its GPU"
        parity = {"passed": False, "compared": False, "why": why, "rows": {}}
        EngineFolder(part, replace(manifest, parity=parity)).write()
        os.rename(part, final)
        return EngineFolder.read(final)
    say(f"{name}: comparing with the torch engine in float32")
    runs_on = torch.device("cuda") if manifest.device["type"] == "cuda" else target.device
    engine = engine_of(EngineFolder(part, manifest), runs_on)
    reference = TorchEngine(load.load_transformer(folder, torch.float32, runs_on, "torch"))
    parity = gate(engine, reference, manifest.architecture, target.ordered(), target.precision, runs_on)
    engine.unload()
    del reference
    gc.collect()
    done = EngineFolder(part, replace(manifest, parity=parity))
    done.write()
    where = final if parity["passed"] else final.with_suffix(".failed")
    if where.exists():
        shutil.rmtree(where)
    os.rename(part, where)
    if not parity["passed"]:
        raise ModelError(
            f"the {name} engine is not the model it was made of: {parity['why']}. It is kept in {where}, and is not loaded "
            "unless you force it; try another precision."
        )
    return EngineFolder(where, done.manifest)


def export_pair(
    generators: dict[str, Path], encoders: dict[str, Path], index: Path | None, target: Target, output: Path, command: str,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, EngineFolder]:  # fmt: skip
    """Export the generators of a pair into a folder that `NexusPipeline.from_engines` loads by itself.

    Args:
        generators: "small", "large" -> folder. encoders: part -> folder, linked beside the engines. index: the pair's
            `model_index.json`, copied for its defaults.
        output: the folder to make; engines that it holds already are replaced, and each appears only when complete.

    Raises:
        InputError, ModelError: as `export_generator`.
    """
    target.builder()
    output.mkdir(parents=True, exist_ok=True)
    built = {}
    for name, source in generators.items():
        engine = export_generator(name, source, target, command, say)
        place = output / name
        old = output / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            os.rename(place, old)
        link_tree(engine.path, place)
        shutil.rmtree(old, ignore_errors=True)
        built[name] = EngineFolder(place, engine.manifest)
    for part, source in encoders.items():
        if not (output / part).exists():
            link_tree(source, output / part)
    if index is not None:
        shutil.copy2(index, output / "model_index.json")
    return built
