"""Mutants of single files: headers of safetensors and notes in them, GGUF headers, SentencePiece
models and pickles, each mutated as what it is (tests/fuzz.py runs them)."""

import json
import struct

import torch
from safetensors.torch import save_file

from tests import published

NUMBERS = (0, 1, 2, 3, 7, 255, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
NAMES = (
    "",
    "a\0b",
    "x" * 300,
    "\u2028",
    "blocks.999999.x.weight",
    "é" * 40,
    "module.a",
    "a.weight",
)


DOCUMENTS = ("_quantization_metadata", "lora_adapter_metadata")  # JSON in headers


def mutated_safetensors(data, rng, mutated):
    """A safetensors file whose header, or a document in it, has places changed."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    notes = [n for n in header if n.endswith(".comfy_quant")]
    metadata = header.get("__metadata__", {})
    if notes and rng.random() < 0.6:
        start, stop = header[rng.choice(notes)]["data_offsets"]
        note = json.dumps(mutated(json.loads(body[start:stop]), rng)).encode()
        room = stop - start  # of the same length, so that the offsets stay
        note = note[:room].ljust(room) if len(note) <= room or rng.random() < 0.2 else None
        if note is not None:
            return data[:8] + data[8 : 8 + size] + body[:start] + note + body[stop:]
    document = next((k for k in DOCUMENTS if k in metadata), None)
    if document is not None and rng.random() < 0.7:
        metadata[document] = json.dumps(mutated(json.loads(metadata[document]), rng))
    elif rng.random() < 0.3:
        name = rng.choice([n for n in header if n != "__metadata__"])
        header[rng.choice((*NAMES, name + "_scale", name + "s"))] = header.pop(name)
    elif rng.random() < 0.3:  # another type of the same width, or another shape of as many
        entry = header[rng.choice([n for n in header if n != "__metadata__"])]
        other = {"F32": ("I32", "U32"), "I8": ("U8", "F8_E4M3"), "F8_E4M3": ("I8", "F8_E5M2", "U8")}
        entry["dtype"] = rng.choice(other.get(entry["dtype"], ("F32",)))
        if rng.random() < 0.5:
            entry["shape"] = rng.choice(([*entry["shape"], 1], entry["shape"][::-1], [1, 0]))
    else:
        header = mutated(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutated_numbers(data, rng, widths=(1, 4, 8), within=4096):
    """Bytes with some numbers among the first ones overwritten."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        width, at = rng.choice(widths), rng.randrange(max(1, min(len(data), within) - 8))
        data[at : at + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def mutated_pieces(data, rng):
    """A sentencepiece model with fields of its messages changed, doubled, nested or cut."""
    field = lambda number, kind, body: bytes([number << 3 | kind]) + body
    varint = lambda n: bytes([n & 127 | 128, *varint(n >> 7)]) if n > 127 else bytes([n])
    kind = rng.random()
    if kind < 0.3:
        return mutated_numbers(data, rng, (1, 1, 4), len(data))
    number = rng.randrange(1, 6)
    inner = rng.choice(
        (
            field(rng.randrange(1, 5), 0, varint(rng.choice(NUMBERS) % 2**63)),
            field(rng.randrange(1, 5), 5, struct.pack("<f", rng.choice((0, 1e38, float("nan"))))),
            field(rng.randrange(1, 5), 2, b"\x04</s>"),
            field(rng.randrange(1, 5), 2, varint(rng.choice(NUMBERS) % 2**63)),
            bytes(rng.randrange(256) for _ in range(rng.randrange(9))),
        )
    )
    piece = field(number, 2, varint(len(inner)) + inner)
    if kind < 0.4:
        return piece
    at = rng.choice((0, len(data)))
    return data[:at] + piece + data[at:]


def scaled_files(work):
    """Single files of a tiny Wan in the quantisations that are read: path by name."""
    tiny = dict(num_layers=1, num_attention_heads=1, ffn_dim=128)
    state, files = published.wan_state(**tiny), {}
    fp8, metadata = published.fp8_scaled(state)[0], published.fp8_scaled(state, "metadata")
    files["fp8_scaled file"] = published.save(fp8, work / "fp8.safetensors")
    files["noted header"] = published.save(metadata[0], work / "noted.safetensors", metadata[2])
    noted = {}
    for name, value in state.items():
        noted[name] = value
        if not published.is_quantised(name):
            continue
        scale = value.abs().amax(1, keepdim=True) / 127
        noted[name] = (value / scale).round().to(torch.int8)
        noted[f"{name}_scale"] = scale
        note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
        text = json.dumps({**note, "orig_dtype": "torch.bfloat16", "params": {}}).ljust(200)
        key = name.removesuffix("weight") + "comfy_quant"
        noted[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    files["rotated int8 file"] = published.save(noted, work / "int8.safetensors")
    files["single file"] = published.save(state, work / "wan.safetensors")
    published.save_gguf(state, work / "wan.gguf", ("Q8_0", "F16"))
    files["GGUF"] = work / "wan.gguf"
    torch.save(noted, work / "wan.pth")
    files["pickle"] = work / "wan.pth"
    return files


FIELDS = {"format", "group_size", "convrot", "convrot_groupsize", "params", "per_row", "orig_shape"}
FIELDS |= {"symmetric", "orig_dtype", "full_precision_matrix_mult"}


def check_understood(path, found):
    """Raise where a file was read and says of its weights what was not done.

    found: what `find_tensors` made of it.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    stated = json.loads((header.get("__metadata__") or {}).get("_quantization_metadata", "{}"))
    assert stated.keys() <= {"layers", "format_version"}, stated
    notes = dict(stated.get("layers", {}))
    for name, entry in header.items():
        if name.endswith(".comfy_quant"):
            start, stop = entry["data_offsets"]
            notes[name.removesuffix(".comfy_quant")] = json.loads(body[start:stop])
    for layer, note in notes.items():
        fields = {**note, **(note.get("params") or {})}
        assert fields.keys() <= FIELDS, (layer, note)
        encoding = found[f"{layer}.weight"].encoding
        rotation = fields.get("convrot_groupsize", 256) if fields.get("convrot") else None
        assert encoding is not None and encoding.rotation == rotation, (layer, note)
    if notes or any(n.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for n in header):
        for name, stored in found.items():
            bare = stored.dtype.itemsize == 1 and stored.encoding is None
            assert not bare or not name.endswith(".weight"), name


def make_targets(pair, work, target, mutated):
    """Single files, GGUF and SentencePiece.

    Args:
        pair: a tiny pair's folder. work: an empty folder. target: `tests.fuzz.Target`. mutated: of
            a document.
    """
    from safetensors.torch import load_file

    from nexus_rt.components.text import TextEncoder
    from nexus_rt.components.vae import VideoDecoder
    from nexus_rt.loading.formats.stored import read_tensors
    from nexus_rt.loading.lora import Lora
    from nexus_rt.loading.lora_changes import Changes
    from nexus_rt.loading.tensors import find_tensors
    from nexus_rt.loading.tokenizer import load_tokenizer
    from nexus_rt.loading.transformer import load_transformer
    from nexus_rt.models.pieces import tokenizer_of
    from tests.test_single_files import spiece_model

    class File(target):
        """A file that is mutated as what it is."""

        def __init__(self, name, path, read, mutants):
            super().__init__(name, path, read, text=False)
            self.mutants = mutants

        def mutant(self, rng):
            if rng.random() < 0.15:
                return super().mutant(rng)
            return self.mutants(self.good, rng)

    def loads(path):
        """A transformer."""
        return lambda: load_transformer(path, torch.float32)

    def decodes(path):
        """Every tensor as float32, without a model that asks for its shapes."""

        def read():
            found = find_tensors(path)
            for name, value in read_tensors(found.items()):
                assert tuple(value.shape) == found[name].shape, name
            if path.suffix == ".safetensors":
                check_understood(path, found)

        return read

    header = lambda data, rng: mutated_safetensors(data, rng, mutated)
    numbers = lambda data, rng: mutated_numbers(data, rng)
    targets = []
    for name, path in scaled_files(work).items():
        mutants = header if path.suffix == ".safetensors" else numbers
        targets.append(File(name, path, loads(path), mutants))
        if name != "single file":
            targets.append(File(f"{name}'s tensors", path, decodes(path), mutants))
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    config["config_groups"] = {"g": {"weights": weights, "targets": ["Linear"]}}
    folder = work / "config"
    folder.mkdir()
    raw = {"a.weight": torch.ones(8, 8).to(torch.int8), "a.weight_scale": torch.ones(8, 1)}
    save_file(raw, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    targets.append(target("quantization_config", folder / "config.json", decodes(folder)))

    place = "transformer.blocks.0.attn1.to_q"
    halves = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    lora = work / "lora.safetensors"
    stated = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.rank_pattern": {}}
    save_file(
        {f"{place}.{k}": v for k, v in halves.items()},
        lora,
        {"lora_adapter_metadata": json.dumps({**stated, "transformer.use_rslora": False})},
    )
    shapes = {"blocks.0.attn1.to_q.weight": (32, 32)}
    targets.append(File("LoRA's header", lora, lambda: Changes([Lora(lora)], shapes), header))

    theirs = load_file(pair / "text_encoder" / "model.safetensors")
    pieces = torch.tensor(list(spiece_model()), dtype=torch.uint8)
    text = published.save({**theirs, "spiece_model": pieces}, work / "umt5.safetensors")
    encode = lambda: TextEncoder(text, torch.float32, "cpu").encode(["a red"], 8)
    targets.append(File("text encoder in a file", text, encode, header))
    (work / "spiece.model").write_bytes(spiece_model())
    file = work / "pieces.safetensors"

    def tokenized():
        model = (work / "spiece.model").read_bytes()
        published.save({"spiece_model": torch.tensor(list(model), dtype=torch.uint8)}, file)
        load_tokenizer(file, "tokenizer").encode("a red z", limit=5)
        tokenizer_of(model)

    targets.append(File("SentencePiece", work / "spiece.model", tokenized, mutated_pieces))
    vae = published.save(published.vae_state(), work / "vae.safetensors")
    targets.append(
        File("VAE in a file", vae, lambda: VideoDecoder(vae, torch.float32, "cpu").load(), header)
    )
    return targets
