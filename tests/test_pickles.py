"""The pickle reader: what torch and numpy write is read as it is, and no trick makes it run, build
or call anything."""

import collections
import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.formats.pickles import read_pickle, read_state
from nexus_rt.loading.formats.unpickling import MAX_OPCODES
from tests.refusals import refuses

VALUE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "t": torch.arange(12.0).reshape(3, 4).t(),
    "v": torch.arange(10)[3:7],
    "e": torch.empty(0, 3),
    "b": [torch.ones(2, dtype=torch.bfloat16), (1, "x", None)],
    "i": torch.tensor(7),
    "f8": torch.ones(4).to(torch.float8_e4m3fn),
    "c": np.arange(4, dtype=np.float32),
    "F": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "d": torch.nn.Parameter(torch.zeros(3)),
    "n": np.float64(2.5),
    "s": {1.5, 2.5},
    "fs": frozenset({"x"}),
    "bool": np.array([True, False]),
    "o": collections.OrderedDict(x=1),
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "bytes": b"\x00\xff",
}


def same(got, wanted):
    if isinstance(wanted, torch.Tensor):
        return torch.equal(got.float(), wanted.detach().float()) and got.dtype == wanted.dtype
    if isinstance(wanted, np.ndarray):
        return np.array_equal(got, wanted) and got.dtype == wanted.dtype.newbyteorder("=")
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    return got == wanted and (type(got) is type(wanted) or isinstance(wanted, torch.Size))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_are_read_as_they_are(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(VALUE, protocol))
    got = read_pickle(tmp_path / "a.pkl")
    assert got.keys() == VALUE.keys() and all(same(got[k], v) for k, v in VALUE.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_torch_save_are_read_as_they_are(tmp_path, zipped, protocol):
    value = {k: v for k, v in VALUE.items() if zipped or k != "f8"}
    torch.save(
        value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol
    )
    got = read_pickle(tmp_path / "a.pt")
    assert got.keys() == value.keys() and all(same(got[k], v) for k, v in value.items())
    shared = torch.arange(8.0)
    torch.save([shared, shared[2:4]], tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
    a, b = read_pickle(tmp_path / "b.pt")
    # one storage still
    assert a.untyped_storage().data_ptr() <= b.data_ptr() < a.untyped_storage().data_ptr() + 32


def rezipped(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """A torch.save zip with its records changed."""
    with zipfile.ZipFile(path) as old:
        records = [(i.filename, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records:
            if (data := change(name, data)) is not None:
                new.writestr(name, data)


def saved(tmp_path, value=None):
    torch.save({"x": torch.arange(1000.0)} if value is None else value, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_deflated_records_are_unpacked_and_big_endian_is_swapped(tmp_path):
    path = saved(tmp_path)
    rezipped(path, compression=zipfile.ZIP_DEFLATED)
    assert torch.equal(read_pickle(path)["x"], torch.arange(1000.0))
    value = {
        "f": torch.arange(9.0),
        "h": torch.arange(9).half(),
        "c": torch.arange(4.0).to(torch.complex64),
        "l": torch.arange(5),
    }
    path = saved(tmp_path, value)
    sizes = {
        i: t.element_size() // (2 if t.is_complex() else 1) for i, t in enumerate(value.values())
    }

    def big(name, data):
        if name.endswith("byteorder"):
            return b"big"
        if "/data/" in name:
            return (
                np.frombuffer(data, f"<u{sizes[int(name.rsplit('/', 1)[1])]}").byteswap().tobytes()
            )
        return data

    rezipped(path, big)
    got = read_pickle(path)
    assert all(torch.equal(got[k], v) for k, v in value.items())


ZIPS = {
    "a storage cut": ("damaged", lambda n, d: d[:-4] if n.endswith("data/0") else d),
    "a storage empty": ("damaged", lambda n, d: b"" if n.endswith("data/0") else d),
    "a storage longer": ("damaged", lambda n, d: d + b"1234" if n.endswith("data/0") else d),
    "no storage": ("missing", lambda n, d: None if n.endswith("data/0") else d),
    "no pickle": ("missing", lambda n, d: None if n.endswith("data.pkl") else d),
    "an odd byte order": (
        "unsupported",
        lambda n, d: b"middle" if n.endswith("byteorder") else d,
    ),
}


@pytest.mark.parametrize("code, change", ZIPS.values(), ids=ZIPS)
def test_damaged_zips_are_refused_and_never_other_numbers(tmp_path, code, change):
    path = saved(tmp_path)
    rezipped(path, change)
    with refuses(code, kind=ModelError):
        read_pickle(path)


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path):
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<3f", 500, 501, 502))
    data[at] ^= 1
    path.write_bytes(data)
    with refuses("damaged", kind=ModelError) as error:
        read_pickle(path)
    assert "data/0" in str(error.value) and "checksum" in str(error.value)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(9.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pickle(path)["x"], torch.arange(9.0))


@pytest.mark.parametrize("instructions", [b"(" * 10**7, b"N0" * 1_100_000])
def test_a_size_bomb_is_one_sentence(tmp_path, instructions):
    path = saved(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", b"\x80\x02" + instructions + b".")
        bomb.writestr("a/data/0", bytes(10**7))
    with refuses("too_large", kind=ModelError) as caught:
        read_pickle(path)
    assert str(MAX_OPCODES) in str(caught.value) and len(str(caught.value)) < 800


def opcodes(*pieces):
    return b"\x80\x02" + b"".join(pieces) + b"."


def call(module, name, arguments=b"(t"):
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def rebuilt(offset, size, stride):
    """A pickle of a tensor over four numbers, as torch wrote it before its storages were untyped:
    torch warns."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                torch.arange(4.0).storage(),
                offset,
                size,
                stride,
                False,
                collections.OrderedDict(),
            )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        return pickle.dumps(Tensor(), 2)


def repacked(path, instructions):
    """A torch.save zip with other instructions, and right checksums."""
    rezipped(saved(path), lambda n, d: instructions if n.endswith("data.pkl") else d)
    return path / "a.pt"


def nested(depth):
    """A dictionary whose key is a pair of one pair twice, of one pair twice ...: 2^depth hashes."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))
    return opcodes(b"K\x01K\x02\x86q\x00", pairs, b"}h%cNs" % depth)


def expanded(size, stride):
    """The thousand numbers of a.pt's record as a tensor of another shape."""
    size, stride = (b"\x8a\x08" + struct.pack("<q", n) + b"\x85" for n in (size, stride))
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"M\xe8\x03"
    return opcodes(
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQK\x00" + size + stride,
        b"\x89ccollections\nOrderedDict\n)RtR",
    )


def flipped(path):
    data = bytearray(saved(path).read_bytes())
    data[data.index(struct.pack("<3f", 500, 501, 502)) + 3] ^= 1
    (path / "a.pt").write_bytes(data)


def cut(path):
    rezipped(saved(path), lambda n, d: d[:-400] if n.endswith("data/0") else d)


def torch_reads(path, mapped=True):
    return torch.load(path / "a.pt", weights_only=True, mmap=mapped)


@pytest.mark.parametrize("damage", [flipped, cut])
def test_torch_reads_damaged_records_as_other_numbers(tmp_path, damage):
    damage(tmp_path)
    assert not torch.equal(torch_reads(tmp_path)["x"], torch.arange(1000.0))
    with refuses("damaged", kind=ModelError):
        read_pickle(tmp_path / "a.pt")


def test_torch_maps_compressed_records_as_they_are(tmp_path):
    value = torch.arange(4096).to(torch.uint8) % 16
    random = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator())
    rezipped(saved(tmp_path, {"x": value, "y": random}), compression=zipfile.ZIP_DEFLATED)
    assert not torch.equal(torch_reads(tmp_path)["x"], value)
    assert torch.equal(read_pickle(tmp_path / "a.pt")["x"], value)


@pytest.mark.parametrize(
    "instructions, read, code",
    [
        (expanded(10**12, 0), lambda t: t.numel() == 10**12, "damaged"),
        (opcodes(call("builtins", "bytearray", b"J\x00\x00\x00\x10\x85")), len, "damaged"),
    ],
    ids=["a tensor of 4 TB", "256 MiB of zeros"],
)
def test_torch_makes_what_fills_the_memory(tmp_path, instructions, read, code):
    path = repacked(tmp_path, instructions)
    assert path.stat().st_size < 10_000 and read(torch_reads(tmp_path))
    with refuses(code, kind=ModelError):
        read_pickle(path)


def torch_reads_on_a_small_stack(path):
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
    torch_reads(path)


@pytest.mark.parametrize(
    "instructions, exits",
    [(nested(60), -signal.SIGKILL), (opcodes(b"}K\x01", b"\x85" * 10**5, b"Ns"), -signal.SIGSEGV)],
    ids=["takes 2^60 hashes", "overflows the stack"],
)
def test_a_key_stops_torch(tmp_path, instructions, exits):
    path = repacked(tmp_path, instructions)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=torch_reads_on_a_small_stack, args=(tmp_path,))
    process.start()
    process.join(2 if exits == -signal.SIGKILL else 60)
    process.kill()
    process.join()
    assert process.exitcode == exits
    with refuses("damaged", kind=ModelError) as error:
        read_pickle(path)
    assert "a key is a tuple" in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["a plain pickle", "arrays in a zip", "tensors in a zip"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_torch_refuses_what_is_read_here(tmp_path, kind, protocol):
    tensors, array = {"x": torch.arange(6.0), "n": 7}, np.arange(6.0)
    value = {**tensors, "a": array} if kind == "arrays in a zip" else tensors
    if kind == "a plain pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(value, protocol))
    else:
        torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    taken = kind == "tensors in a zip" and protocol == 2
    if not taken:
        with pytest.raises(pickle.UnpicklingError):
            torch_reads(tmp_path, mapped=kind != "a plain pickle")
    got = read_pickle(tmp_path / "a.pt")
    assert got.keys() == value.keys() and all(same(got[k], v) for k, v in value.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_go_through_torch(tmp_path, monkeypatch, zipped):
    linear, leaf = torch.nn.Linear(3, 2), torch.ones(2, requires_grad=True)
    value = {"model": linear.state_dict(), "step": 7, "more": [leaf, {"rate": 0.5}]}
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or load(*a, **k))
    got = read_pickle(tmp_path / "a.pt")
    assert [k["weights_only"] for k in calls] == [True]
    assert torch.equal(got["model"]["weight"], linear.weight) and got["step"] == 7
    assert not got["more"][0].requires_grad and got["more"][1] == {"rate": 0.5}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux names its mapped files")
@pytest.mark.parametrize("more", [{}, {"array": np.arange(3)}], ids=["torch's", "ours"])
def test_tensors_of_a_zip_stay_on_disk(tmp_path, more):
    path = saved(tmp_path, {"x": torch.arange(1000.0), **more})
    got = read_pickle(path)
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    got["x"][0] = 5  # a page of its own
    assert read_pickle(path)["x"][0] == 0


def test_a_tensor_that_is_used_twice_is_one_tensor_still(tmp_path):
    shared = torch.arange(4.0)
    got = read_pickle(saved(tmp_path, {"a": shared, "b": shared, "c": (1, 2)}))
    assert got["a"] is got["b"] and torch.equal(got["a"], shared) and got["c"] == (1, 2)


def test_values_are_not_copied_more_often_than_they_are_written(tmp_path):
    numbers = b"".join(b"J" + struct.pack("<i", i) for i in range(100_000))
    copies = b"c__builtin__\nset\nh\x00\x85R" * 30
    path = repacked(tmp_path, opcodes(b"]q\x00(", numbers, b"e]", copies, b"\x86"))
    with refuses("too_large", kind=ModelError):
        read_pickle(path)


COMMAND = "touch owned"
DTYPE = call("numpy", "dtype", text("O8") + b"K\x00K\x01\x87")
TRICKS = {
    "os.system": opcodes(call("os", "system", text(COMMAND) + b"\x85")),
    "posix": opcodes(call("posix", "system", text(COMMAND) + b"\x85")),
    "eval": opcodes(call("builtins", "eval", text("1") + b"\x85")),
    "__builtin__.eval": opcodes(call("__builtin__", "eval", text("1") + b"\x85")),
    "getattr": opcodes(call("builtins", "getattr", b"(t")),
    "import": opcodes(call("importlib", "import_module", text("os") + b"\x85")),
    "a dotted name": (
        b"\x80\x04"
        + text("torch")
        + text("serialization.os.system")
        + b"\x93"
        + text(COMMAND)
        + b"\x85R."
    ),
    "a dotted allowed name": (
        b"\x80\x04" + text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93."
    ),
    "an object dtype": opcodes(
        DTYPE, b"(K\x03", text("|"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    ),
    "a scalar of objects": opcodes(
        call("numpy.core.multiarray", "scalar", DTYPE + b"C\x08AAAAAAAA\x86")
    ),
    "an array of objects": opcodes(
        call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\x00\x85C\x01b\x87"),
        b"(K\x01K\x01\x85",
        DTYPE,
        b"\x89C\x08AAAAAAAAtb",
    ),
    "a frombuffer of objects": opcodes(
        call(
            "numpy.core.numeric",
            "_frombuffer",
            b"(C\x08AAAAAAAA" + DTYPE + b"K\x01\x85" + text("C") + b"t",
        )
    ),
    "flags cleared": opcodes(
        call("numpy", "dtype", text("f8") + b"K\x00K\x01\x87"),
        b"(K\x03",
        text("<"),
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb",
    ),
    "fields": opcodes(
        call("numpy", "dtype", text("f8") + b"K\x00K\x01\x87"),
        b"(K\x03",
        text("<"),
        b"N(tNK\x00K\x00K\x00tb",
    ),
    "a void dtype": opcodes(call("numpy", "dtype", text("V8") + b"\x85")),
    "a list dtype": opcodes(call("numpy", "dtype", b"](" + text("f4") + b"e\x85")),
    "defaults of a function": opcodes(
        b"ctorch._utils\n_rebuild_parameter\n", b"N}(", text("__defaults__"), b"(tu\x86b"
    ),
    "code of a function": opcodes(b"c_codecs\nencode\n", b"}(", text("__code__"), b"Nub"),
    "attributes of a class": opcodes(
        b"ccollections\nOrderedDict\n", b"}(", text("__reduce__"), b"Nub"
    ),
    "a subtype of ndarray": opcodes(
        call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nmatrix\nK\x00\x85C\x01b\x87")
    ),
    "NEWOBJ": opcodes(b"ccollections\nOrderedDict\n)\x81"),
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "INST": b"(S'a'\nicollections\nOrderedDict\n.",
    "OBJ": b"(ccollections\nOrderedDict\no.",
    "EXT1": b"\x80\x02\x82\x01.",
    "BUFFER": b"\x80\x05\x97.",
    "a persistent id": opcodes(text("x"), b"Q"),
    "a persistent line": b"Pabc\n.",
    "a storage's constructor": opcodes(
        call("torch", "FloatStorage", b"\x8a\x05\x00\x00\x00\x00\x10\x85")
    ),
    "a codec": opcodes(call("_codecs", "encode", text("x") + text("rot13") + b"\x86")),
    "bytes of a length": opcodes(call("builtins", "bytes", b"J\xff\xff\xff\x7f\x85")),
    "a nested storage that calls": opcodes(
        call(
            "torch.storage",
            "_load_from_bytes",
            b"B"
            + struct.pack("<I", 40)
            + opcodes(call("os", "system", b"(t")).ljust(40, b".")
            + b"\x85",
        )
    ),
    "partial": pickle.dumps(__import__("functools").partial(print)),
    "operator": pickle.dumps(__import__("operator").attrgetter("x")),
    "a module's function": pickle.dumps(os.path.join),
    "an exception": pickle.dumps(ValueError("x")),
    "a range": pickle.dumps(range(3)),
    "torch.load": opcodes(call("torch", "load", text("x") + b"\x85")),
    "a hook": opcodes(call("torch._utils", "_rebuild_parameter", b"N\x89N\x87")),
    "deep nesting": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "marks": b"(" * 10**6 + b".",
    "no stop": b"\x80\x02N",
    "a key that takes long": b"\x80\x02K\x01K\x02\x86" + b"2\x86" * 40 + b"}q\x00" + b"h\x000.",
    "keys of tuples of tuples": b"\x80\x02}" + b"K\x01" + b"2\x86" * 60 + b"Ns.",
    "an unhashable key": opcodes(b"}]Ns"),
    "a name that takes long": b"\x80\x04K\x01K\x02\x86" + b"2\x86" * 40 + b"2\x93.",
    "empty": b"",
    "text": b"hello",
    "a memo that is not": b"\x80\x02h\x07.",
    "two values": b"\x80\x02NN.",
    "a huge int": b"I" + b"9" * 10**6 + b"\n.",
    "a long length": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a bytes length": b"\x80\x02B\xff\xff\xff\x7fab.",
    "half a text": b"\x80\x02X\x04\x00\x00\x00\xff\xff\xff\xff.",
}

# offset, size and stride of a tensor over four numbers
REBUILT = {
    "beyond its storage": (0, (5,), (1,)),
    "an offset beyond": (4, (1,), (1,)),
    "a negative stride": (3, (2,), (-1,)),
    "a negative offset": (-1, (2,), (1,)),
    "a stride of zero": (0, (10**12,), (0,)),
    "strides too few": (0, (2, 2), (1,)),
    "a huge shape": (0, (2**62, 2**62), (1, 1)),
    "a float shape": (0, (2.0,), (1,)),
    "a bool offset": (True, (2,), (1,)),
}


def tricks():
    return TRICKS | {name: rebuilt(*layout) for name, layout in REBUILT.items()}


TOO_LARGE = ("deep nesting", "marks")
DAMAGED = (  # they ask for nothing, and are no pickle of tensors either
    *("a list dtype", "bytes of a length", "beyond its storage", "an offset beyond"),
    *("a negative stride", "a negative offset", "a stride of zero", "strides too few"),
    *("a huge shape", "a float shape", "a bool offset", "a hook", "no stop"),
    *("a key that takes long", "keys of tuples of tuples", "an unhashable key", "empty", "text"),
    "a name that takes long",
    *("a memo that is not", "two values", "a huge int", "a long length", "a bytes length"),
    "half a text",
)


@pytest.mark.parametrize("trick", [*TRICKS, *REBUILT])
def test_no_trick_is_run_and_every_one_is_refused(tmp_path, monkeypatch, trick):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(tricks()[trick])
    code = "damaged" if trick in DAMAGED else "too_large" if trick in TOO_LARGE else "unsafe"
    with refuses(code, kind=ModelError) as caught:
        read_pickle(tmp_path / "a.pkl")
    assert len(str(caught.value)) < 800 and sorted(os.listdir(tmp_path)) == ["a.pkl"]


def test_nothing_of_the_libraries_is_changed(tmp_path):
    before = (
        torch._utils._rebuild_parameter.__defaults__,
        collections.OrderedDict.__reduce__,
        dict(np.dtype.__dict__),
    )
    for data in tricks().values():
        (tmp_path / "a.pkl").write_bytes(data)
        with pytest.raises(ModelError):
            read_pickle(tmp_path / "a.pkl")
    assert (
        torch._utils._rebuild_parameter.__defaults__,
        collections.OrderedDict.__reduce__,
        dict(np.dtype.__dict__),
    ) == before


def test_a_state_under_two_names_is_refused(tmp_path):
    torch.save({"x": torch.ones(1), "module.x": torch.zeros(1)}, tmp_path / "a.pt")
    with refuses("duplicate", kind=ModelError):
        read_state(tmp_path / "a.pt")
    torch.save({1: torch.ones(1)}, tmp_path / "a.pt")
    with refuses("invalid_model", kind=ModelError):
        read_state(tmp_path / "a.pt")


def seeds(folder):
    for i, data in enumerate(tricks().values()):
        if len(data) < 5000:
            (folder / f"{i:03}.seed").write_bytes(data)
    for protocol in (2, 5):
        (folder / f"p{protocol}.seed").write_bytes(pickle.dumps(VALUE, protocol))
    torch.save(VALUE, folder / "zip.seed")
    torch.save({"x": torch.arange(6.0), "n": {"y": torch.ones(2, 2)}}, folder / "state.seed")
    torch.save({"x": torch.arange(6.0)}, folder / "old.seed", _use_new_zipfile_serialization=False)
    return folder


def fuzz(folder, count, seed):
    script = os.path.join(os.path.dirname(__file__), "pickle_fuzz.py")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, script, str(folder), str(count), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1500:]
    return done.stdout


@pytest.mark.process
def test_mutations_run_nothing(tmp_path):
    """In a process whose audit hook stops it at exec, compile, imports, processes and files opened
    for writing."""
    said = fuzz(seeds(tmp_path), 1500, 0)
    assert "'refused'" in said


@pytest.mark.slow
@pytest.mark.process
def test_twenty_thousand_mutations_run_nothing(tmp_path):
    for seed in range(1, 5):
        fuzz(seeds(tmp_path), 5000, seed)


@pytest.mark.parametrize("name", ["a\ud800", "a\0b", "\u2028" * 9, "x" * 100_000, ""])
def test_odd_names_of_a_state_are_one_sentence(tmp_path, name):
    """pickle writes half a surrogate pair as it writes any text."""
    from nexus_rt.loading.transformer import load_transformer

    torch.save({name: torch.ones(2)}, tmp_path / "wan.pth")
    with pytest.warns(UserWarning, match="is a pickle"), pytest.raises(ModelError) as error:
        load_transformer(tmp_path / "wan.pth")
    assert str(error.value).encode() and len(str(error.value)) < 900
