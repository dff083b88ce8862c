"""Reads mutated pickles in a process whose audit hook fails on anything that runs, starts or
writes: see test_pickles.py.

python tests/pickle_fuzz.py FOLDER COUNT SEED
"""

import contextlib
import io
import random
import sys
import time
import zipfile
from pathlib import Path

FORBIDDEN = (
    "exec",
    "compile",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "import",
    "ctypes.",
    "socket.",
    "pickle.find_class",
    "marshal.",
    "code.__new__",
    "object.__setattr__",
    "os.remove",
    "shutil.",
)
armed = False


def audit(event, arguments):
    if not armed:
        return
    written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if written or event.startswith(FORBIDDEN):
        print(f"FORBIDDEN {event} {arguments!r:.200}", flush=True)
        import os

        os._exit(3)


def mutated(data, rng, others):
    """Bits, bytes, pieces moved, cut or from another file, and lengths made large."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        kind, at = rng.randrange(7), rng.randrange(len(data) or 1)
        if not data:
            break
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b"\x00\xff\x80cR(.bi0Qq]}tN\x81\x92\x93\x94\x8c\x8e")
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            piece = data[at : at + rng.randrange(1, 40)]
            data[rng.randrange(len(data)) : 0] = piece
        elif kind == 4:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[at : at + rng.randrange(40)] = other[start : start + rng.randrange(1, 200)]
        elif kind == 5:
            data[at : at + 8] = rng.choice(
                (b"\xff" * 8, (2**31).to_bytes(8, "little"), (2**62).to_bytes(8, "little"))
            )
        else:
            del data[at:]
    return bytes(data)


def rewritten(data, rng, others):
    """A zip whose instructions are mutated, and whose checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            record = old.read(info)
            change = info.filename.endswith("data.pkl")
            new.writestr(info.filename, mutated(record, rng, others) if change else record)
    return out.getvalue()


def main(folder, count, seed):
    global armed
    from nexus_rt.core.errors import ModelError
    from nexus_rt.loading.formats.pickles import read_pickle

    files = sorted(Path(folder).glob("*.seed"))
    seeds = [data for f in files if (data := f.read_bytes())]
    zips = [data for data in seeds if data[:2] == b"PK"]
    seeds += zips * (len(seeds) // (2 * len(zips)))  # a third are zips
    for file in files:  # whatever reading imports is imported
        with contextlib.suppress(ModelError):
            read_pickle(file)
    rng, sys_path = random.Random(seed), Path(folder) / f"mutant-{seed}"
    counts, slowest = {"read": 0, "refused": 0}, 0.0
    sys.addaudithook(audit)
    for _ in range(count):
        data = rng.choice(seeds)
        change = rewritten if data[:2] == b"PK" and rng.random() < 0.8 else mutated
        sys_path.write_bytes(change(data, rng, seeds))
        armed, began = True, time.perf_counter()
        try:
            read_pickle(sys_path)
            kind = "read"
        except ModelError as error:
            kind = "refused"
            assert len(str(error)) < 1000, str(error)[:2000]
        finally:
            armed = False
        counts[kind] += 1
        slowest = max(slowest, time.perf_counter() - began)
    print(f"{counts} slowest {slowest:.3f} s")
    assert slowest < 2


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
