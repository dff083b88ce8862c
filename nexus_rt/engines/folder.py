"""Engine folders: `manifest.json` and artefacts, checked before anything is run; and the cache they
are built in.

A folder says what it was made of (the weights' hash, the architecture, sizes, precision), for what
(backend, version, GPU), how right it is (the parity gate's results) and what its files are (sizes
and hashes). Loading refuses whatever does not match, in one sentence that says what differs and
which command rebuilds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.core.part_files import part_file, part_folder
from nexus_rt.core.paths import cache_root
from nexus_rt.engines.manifest import SCHEMA, Manifest, Stored

MANIFEST = "manifest.json"
READ_AGAIN = 64 << 20  # bytes hashed in some 40 ms


def file_hash(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, dict]:
    """The files of a folder as a manifest lists them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
    return files


@dataclass(frozen=True)
class EngineFolder:
    """An engine folder whose manifest has been read."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | Path) -> EngineFolder:
        """Read a folder's manifest.

        Raises:
            ModelError: there is none, it is damaged, or of a newer schema.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise ModelError(
                f"{path} holds no {MANIFEST}; expected an engine folder, as `nexus-rt export`"
                " makes.",
                code="not_found",
            )
        where, remedy = str(path / MANIFEST), "export the engine again"
        document = documents.parse(documents.read_bytes(path / MANIFEST), where, remedy=remedy)
        schema = document.get("schema") if isinstance(document, dict) else None
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise ModelError(
                f"{path / MANIFEST} is no engine's manifest: it has no schema; export the engine"
                " again.",
                code="missing",
                param="schema",
            )
        if schema > SCHEMA:
            raise ModelError(
                f"{path} has a manifest of schema {schema}, and this nexus-rt reads up to {SCHEMA};"
                " upgrade nexus-rt, or export again:"
                f" {shorten(document.get('command', 'nexus-rt export'))}",
                code="unsupported",
                param="schema",
            )
        known = {f.name for f in fields(Manifest)}
        missing = known - document.keys() - {"contract"}
        if missing:
            raise ModelError(
                f"{path / MANIFEST} lacks {', '.join(sorted(missing))}; export the engine again.",
                code="missing",
                param=min(missing),
            )
        stored = documents.check(document, Stored, where, remedy=remedy)
        stored.check(where)
        return cls(path, Manifest(**{k: v for k, v in document.items() if k in known}))

    @property
    def nbytes(self) -> int:
        """Bytes of the artefacts."""
        return sum(f["bytes"] for f in self.manifest.files.values())

    def rebuild(self) -> str:
        return f"rebuild it: {self.manifest.command}"

    def verify(self, again: bool = False) -> None:
        """Compare the files with the manifest.

        Args:
            again: read every file, even one whose hash is remembered.

        Raises:
            ModelError: a file is missing, truncated or damaged.
        """
        for name, known in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise ModelError(f"{file} is missing; {self.rebuild()}", code="not_found")
            size = file.stat().st_size
            if size != known["bytes"]:
                raise ModelError(
                    f"{file} has {size} bytes and was written with {known['bytes']};"
                    f" {self.rebuild()}",
                    code="damaged",
                )
            # small files are read again: it costs less than the question
            whole = again or size <= READ_AGAIN
            if (file_hash if whole else trusted_hash)(file) != known["sha256"]:
                raise ModelError(
                    f"{file} is damaged: its sha256 is not the manifest's; {self.rebuild()}",
                    code="damaged",
                )

    def artefact(self, name: str) -> Path:
        """The path of a file to be loaded, which the manifest must list: what is not hashed is not
        run. A link's target counts by its hash, wherever it lies: a hub's cache is made of links.

        Raises:
            ModelError: it is not listed.
        """
        if name not in self.manifest.files:
            raise ModelError(
                f"{self.path / MANIFEST} does not list {name}, which the engine needs;"
                f" {self.rebuild()}",
                code="missing",
                param=name,
            )
        return self.path / name

    def check_here(self, versions: dict[str, str], device: dict[str, Any]) -> None:
        """Compare what it was built for with what is here.

        Args:
            versions: of the backend as found here, under its name. device: as in the manifest.

        Raises:
            ModelError: another version, kind of device or GPU architecture; says which.
        """
        m = self.manifest
        different = []
        if m.device["type"] != device["type"]:
            word = {"cuda": "a GPU", "cpu": "a CPU"}
            different.append(tuple(word.get(d["type"], d["type"]) for d in (m.device, device)))
        elif m.device.get("sm") and m.device["sm"] != device.get("sm"):
            different.append((f"compute capability {m.device['sm']}", device.get("sm")))
        needed = set(m.options.get("instruction_sets") or ()) - set(
            device.get("instruction_sets") or ()
        )
        if needed and device.get("instruction_sets") is not None:
            different.append((f"a processor with {', '.join(sorted(needed)[:4])}", "one without"))
        here = versions.get(m.backend)
        if here is not None and here != m.backend_version:
            different.append((f"{m.backend} {m.backend_version}", here))
        if different:
            theirs, ours = different[0]
            raise ModelError(
                f"{self.path} was built for {theirs}, and this is {ours}; {self.rebuild()}",
                code="mismatch",
            )

    def check_parity(self, force: bool = False) -> None:
        """Raise a `ModelError` unless the parity gate let the engine through, or `force`."""
        if force or self.manifest.parity.get("passed"):
            return
        why = self.manifest.parity.get("why") or "it was never compared"
        raise ModelError(
            f"{self.path} failed its parity gate ({why}); {self.rebuild()}, or load it with"
            " force=True (--force).",
            code="parity",
        )

    def write(self) -> None:
        """Write the manifest; last of a folder's files, so that one without it is unfinished."""
        part = self.path / f".{MANIFEST}.part"
        part.write_text(json.dumps(asdict(self.manifest), indent=1) + "\n")
        os.replace(part, self.path / MANIFEST)


def engines_root() -> Path:
    """Where engines are built and kept, a folder each, named by identity."""
    return cache_root() / "engines"


def trusted_hash(file: Path) -> str:
    """sha256 of a file, remembered in the cache for as long as its size and time stay: loading
    reads 28 GB once."""
    stat = file.stat()
    key = hashlib.sha256(
        f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode()
    ).hexdigest()
    note = cache_root() / "hashes" / key
    try:
        digest = note.read_text().strip()
        if len(digest) == 64:
            return digest
    except OSError:
        pass
    digest = file_hash(file)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with part_file(note) as part:
            part.write_text(digest)
            os.replace(part, note)
    except OSError:  # a cache that cannot be written costs a reading next time
        pass
    return digest


def cached() -> Iterator[EngineFolder]:
    """The engines of the cache, those with a manifest that can be read."""
    root = engines_root()
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if (path / MANIFEST).is_file():
            try:
                yield EngineFolder.read(path)
            except ModelError:
                continue


def unusable() -> Iterator[tuple[Path, str]]:
    """What `prune` removes from the cache: unfinished builds no process holds, engines that failed
    or cannot be read."""
    root = engines_root()
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_symlink() and not path.is_dir():
            yield path, "its output folder has gone"
            continue
        if path.suffix == ".lock" or not path.is_dir():
            continue
        if path.suffix == ".part":
            if not _held(path.with_suffix(".lock")):
                yield path, "an unfinished build"
            continue
        if path.suffix == ".failed":
            yield path, "failed its parity gate"
            continue
        try:
            EngineFolder.read(path).verify(again=True)
        except ModelError as error:
            yield path, str(error).split(";")[0]


def _held(lock: Path) -> bool:
    """Whether a process builds under this lock."""
    import fcntl

    if not lock.exists():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def places(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """A folder's files and where each goes in a copy of it; folders are made on the way, empty ones
    too."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        yield path, place


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder by hard links where the file system has them: a complete pair costs no
    second 28 GB.

    `target` must not exist; it appears only when complete.
    """
    with part_folder(target) as part:
        for path, place in places(source, part):
            real = path.resolve()  # a hub cache is symlinks to blobs
            try:
                os.link(real, place)
            except OSError:
                shutil.copy2(real, place)
