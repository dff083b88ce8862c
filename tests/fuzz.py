"""Structure-aware fuzzing of every reader: mutated documents and files, run in this process by
test_fuzz.py.

Whatever a file holds, a reader returns, or raises one of our errors with a short message, in under
two seconds.
"""

import copy
import hashlib
import json
import random
import resource
import shutil
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nexus_rt.core import documents
from nexus_rt.core.errors import NexusError
from tests import fuzz_files, fuzz_plans, fuzz_serve
from tests.omnivideo import make_llm

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**18,
    -(10**18),
    0.5,
    -0.5,
    1e308,
    -1e308,
    1e-320,
    "",
    "x",
    "0",
    "../../etc",
    "/abs",
    "a/b",
    "\x00",
    "\u2028",
    "é" * 50,
    "x" * 30_000,
    [],
    {},
    [[]],
    [1, 2, 3],
    {"a": 1},
    [None] * 100,
    "nan",
    "owner/kernel",
    "\ud800",
    "a\udfffb" * 3,
    {"\udc00": 1},
    [["\ud83d"]],
    float("nan"),
    float("-inf"),
    10**39,
    10**400,
    -(10**400),
]
RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"{" * 5000,
    b"[" * 5000,
    b'{"a":' * 3000,
    b"NaN",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b"\x00" * 100,
    b'"' * 999,
    b'{"a":1,"a":2}',
    b'{"\\ud800": "\\udfff"}',
    b'{"a": -1e309}',
    b'{"a": 0.' + b"3" * 5000 + b"}",
    b"[" * 64 + b"]" * 64,
]


def places(value, path=()):
    """Every place of a document, containers and leaves."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:50]):
            yield from places(inner, (*path, key))


def mutated(value, rng):
    """A document with one to three places changed, removed, doubled, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = [p for p in places(value) if p]
        if not known:
            return rng.choice(ODD)
        *parents, last = rng.choice(known)
        at = value
        for key in parents:
            at = at[key]
        kind = rng.randrange(6)
        if kind <= 2:
            at[last] = copy.deepcopy(rng.choice(ODD))
        elif kind == 3:
            del at[last]
        elif kind == 4 and isinstance(at, dict):
            names = (
                "x",
                str(last) + "s",
                "../x",
                "auto_map",
                "attn_implementation",
                str(last) + "\ud800",
                "\x00",
            )
            at[rng.choice(names)] = at.pop(last)
        elif isinstance(at[last], (int, float)) and not isinstance(at[last], bool):
            half = 0.5 if abs(at[last]) < 2**1000 else 3  # beyond that it is no float
            at[last] = at[last] * rng.choice((-1, 0, 2, 1000, 10**9, half))
        else:
            for _ in range(rng.choice((2, 80))):
                at[last] = [at[last]]
    return value


def broken(data, rng):
    """A file with bytes flipped, cut, doubled or replaced."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        if not data:
            break
        at, kind = rng.randrange(len(data)), rng.randrange(5)
        if rng.random() < 0.7:
            at = rng.randrange(min(len(data), 4096))  # headers
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 2:
            data[at : at + 8] = rng.choice(
                (b"\xff" * 8, b"\x00" * 8, (2**40).to_bytes(8, "little"))
            )
        elif kind == 3:
            data[at:at] = data[at : at + 64]
        else:
            del data[at:]
    return bytes(data)


class Target:
    """One reader: the file it reads, and what reads it."""

    def __init__(self, name, path, read, text=True):
        self.name, self.path, self.read, self.text = name, Path(path), read, text
        self.good = self.path.read_bytes()
        self.value = json.loads(self.good) if text else None

    def mutant(self, rng):
        if not self.text:
            return broken(self.good, rng)
        kind = rng.random()
        if kind < 0.05:
            return rng.choice(RAW)
        if kind < 0.15:
            return broken(self.good, rng)
        return json.dumps(mutated(self.value, rng)).encode()

    def restore(self):
        self.path.write_bytes(self.good)


def run(targets, count, seed, limit_s=2.0, limit_bytes=2**30):
    """How many inputs each reader took and refused.

    Raises:
        AssertionError: any other exception, one that takes long, memory above the limit, or a long
            message.
    """
    rng, counts = random.Random(seed), {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(count):
        target = targets[number % len(targets)]
        data = target.mutant(rng)
        target.path.write_bytes(data)
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read()
            kind = "read"
        except NexusError as error:
            kind = "refused"
            assert len(str(error)) < 2000, (target.name, len(str(error)), str(error)[:300])
        except Exception as error:
            raise AssertionError(
                f"{target.name}, input {number} of seed {seed}: {type(error).__name__}:"
                f" {error!s:.300}; {data[:400]!r}"
            ) from error
        took = time.perf_counter() - began
        assert took < limit_s, (target.name, number, took, data[:300])
        key = (target.name, kind)
        counts[key] = counts.get(key, 0) + 1
        target.restore()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < limit_bytes, f"memory grew by {grown / 1e9:.2f} GB"
    return counts


def shown_targets(put):
    """Documents that tables and pages are made of."""
    from nexus_rt.bench import page, tables

    cpu = Path(tables.__file__).parent / "results" / "cpu"
    report = put("tables.json", json.loads((cpu / "mini.json").read_text()))
    load = put("serve.json", json.loads((cpu / "serve.json").read_text()))

    def both():
        made = documents.read_object(report)
        return tables.tables(made), tables.headline(made), page.page(made), page.drawing(made)

    return [
        Target("tables and page", report, both),
        Target("table of a load", load, lambda: tables.load_table(documents.read_object(load))),
    ]


def make_targets(pair, steered, work):
    """Every reader of the runtime on files of a tiny pair.

    Args:
        pair: a tiny pair's folder. steered: an understanding model and connector beside it, or
            None. work: an empty folder.
    """
    from nexus_rt.bench import results
    from nexus_rt.bench.vrbench import judging, schema
    from nexus_rt.bench.vrbench.command import EXAMPLE
    from nexus_rt.components.understanding import UnderstandingModel
    from nexus_rt.components.vae import VideoDecoder
    from nexus_rt.engines.folder import EngineFolder
    from nexus_rt.engines.torch import TorchEngine
    from nexus_rt.loading.config import read_json
    from nexus_rt.loading.connector import load_connector
    from nexus_rt.loading.formats.safetensors import read_header
    from nexus_rt.loading.lora import Lora
    from nexus_rt.loading.pair_folder import find_pair
    from nexus_rt.loading.tensors import find_tensors
    from nexus_rt.loading.tokenizer import load_tokenizer
    from nexus_rt.loading.transformer import load_config, load_transformer
    from nexus_rt.loading.umt5 import load_umt5
    from nexus_rt.loading.vae import vae_space
    from nexus_rt.media.latents import read_latents, save_latents
    from nexus_rt.models.connector import ConnectorConfig
    from nexus_rt.models.template import Template
    from nexus_rt.pipeline.defaults import pair_defaults
    from nexus_rt.pipeline.prompts import read_prompts

    root = shutil.copytree(pair, work / "pair")
    cpu, ids = torch.device("cpu"), torch.tensor([[1, 2, 3]])
    llm = work / "llm"
    make_llm(llm)

    def put(name, value):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(json.dumps(value))
        return work / name

    shards = work / "shards"
    shards.mkdir()
    state = load_file(root / "small" / "diffusion_pytorch_model.safetensors")
    names = sorted(state)
    for i in range(2):
        save_file(
            {k: state[k] for k in names[i::2]},
            shards / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors",
        )
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {
            k: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors"
            for i, k in enumerate(names)
        },
    }
    put("shards/diffusion_pytorch_model.safetensors.index.json", index)

    model = load_transformer(root / "small", torch.float32)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    merging = TorchEngine(model)
    place = "transformer.blocks.0.attn1.to_q"
    save_file(
        {
            f"{place}.lora_A.weight": torch.ones(2, 32),
            f"{place}.lora_B.weight": torch.ones(32, 2),
            f"{place}.alpha": torch.tensor(2.0),
        },
        work / "lora.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})},
    )
    adapter = put(
        "peft/adapter_config.json",
        {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2,
            "rank_pattern": {"to_q": 2},
            "alpha_pattern": {"a.*": 1},
        },
    )
    save_file(
        {f"{place}.lora_A.weight": torch.ones(2, 32), f"{place}.lora_B.weight": torch.ones(32, 2)},
        work / "peft" / "adapter_model.safetensors",
    )

    def merge_one(path):
        try:
            merging.set_loras([Lora(path)])
        except NexusError:
            assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items()), (
                "changed, then refused"
            )
            raise
        assert all(v.isfinite().all() for v in model.state_dict().values()), "NaN was merged"
        merging.set_loras([])

    latents = save_latents(torch.randn(1, 16, 2, 4, 6), work)
    wan = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        ffn_dim=48,
        patch_size=[1, 2, 2],
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        cross_attn_norm=True,
        eps=1e-6,
        rope_max_seq_len=1024,
    )
    manifest = dict(
        part="small",
        backend="onnx",
        backend_version="1",
        precision="fp32",
        architecture=wan,
        weights="0" * 64,
        buckets=[[32, 32, 5]],
        graphs={"velocity": ["latents"]},
        device={"type": "cpu", "sm": None, "name": None},
        producer="x",
        command="nexus-rt export",
        opset=23,
        lora=None,
        options={"range": False, "boundary": 0.875, "instruction_sets": ["avx2"]},
        parity={"passed": True, "rows": {"a": {"relative_error": 0.1}}},
        files={"velocity.onnx": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
        schema=1,
    )
    put("engine/manifest.json", manifest)
    (work / "engine" / "velocity.onnx").write_bytes(b"x")

    def engine():
        folder = EngineFolder.read(work / "engine")
        folder.check_parity(force=True)
        here = {"type": "cpu", "sm": None, "name": None, "instruction_sets": ["avx2"]}
        folder.check_here({"onnx": "1"}, here)
        folder.manifest.identity()
        folder.verify(again=True)

    judged = {"q1": {"answer": "Yes", "reason": "", "question": "?", "weight": 1.0, "layer": 0}}
    judgment = {
        "schema": 1,
        "kind": judging.KIND,
        "judge": "j",
        "when": "2026-01-01",
        "protocol": "strict",
        "template": "t",
        "missing": {},
        "failed": {},
        "clips": {
            "a": {
                "category": "ETV",
                "difficulty": "easy",
                "prompt": "p",
                "file": "a.mp4",
                "key": "k",
                "answers": judged,
                "score": 1.0,
                "layers": {},
                "unknown": 0,
                "questions": 1,
            }
        },
    }
    from nexus_rt.bench.vrbench.report import make_report

    taxonomy = schema.read_taxonomy()
    measured = Path(results.__file__).parent / "results" / "cpu" / "mini.json"
    bench = json.loads(measured.read_text())
    bench["rows"] = [{**bench["rows"][0], "thumbnail": None}]
    other = json.loads(json.dumps(bench))

    def compare():
        results.compare(other, results.read(work / "bench.json"))

    line = put(
        "out/results.jsonl",
        {
            "id": "a",
            "status": "done",
            "when": 1.0,
            "file": "a.mp4",
            "settings": {"plan": "x", "steps": 1, "size": "1x1", "frames": 1, "models": ""},
        },
    )

    def resume():
        from nexus_rt.bench.vrbench.report import made_with
        from nexus_rt.pipeline.batch_log import finished

        finished(work / "out")
        made_with(work / "out")

    targets = [
        Target(
            "shard index",
            shards / "diffusion_pytorch_model.safetensors.index.json",
            lambda: find_tensors(shards),
        ),
        Target(
            "Wan config.json",
            root / "small" / "config.json",
            lambda: load_transformer(root / "small", torch.float32),
        ),
        Target(
            "Wan's own config.json",
            put(
                "wan/config.json",
                {"model_type": "t2v", "dim": 32, "num_heads": 2, "ffn_dim": 48, "num_layers": 1},
            ),
            lambda: load_config(work / "wan"),
        ),
        Target(
            "model_index.json",
            root / "model_index.json",
            lambda: pair_defaults(find_pair(root, {}, {}).stated),
        ),
        Target(
            "VAE config.json",
            root / "vae" / "config.json",
            lambda: (vae_space(root / "vae"), VideoDecoder(root / "vae", torch.float32, cpu)),
        ),
        Target(
            "text encoder config.json",
            root / "text_encoder" / "config.json",
            lambda: load_umt5(root / "text_encoder", torch.float32, cpu)(ids, torch.ones_like(ids)),
        ),
        Target(
            "understanding config.json",
            llm / "config.json",
            lambda: UnderstandingModel(llm, Template(), torch.float32, "cpu").hidden_states("a"),
        ),
        Target(
            "tokenizer.json",
            root / "tokenizer" / "tokenizer.json",
            lambda: load_tokenizer(root / "tokenizer", "tokenizer").encode("a red", limit=5),
        ),
        Target(
            "tokenizer_config.json",
            root / "tokenizer" / "tokenizer_config.json",
            lambda: load_tokenizer(root / "tokenizer", "tokenizer").encode("a red", limit=5),
        ),
        Target(
            "transformer weights",
            root / "small" / "diffusion_pytorch_model.safetensors",
            lambda: load_transformer(root / "small", torch.float32),
            False,
        ),
        Target(
            "safetensors header",
            work / "lora.safetensors",
            lambda: read_header(work / "lora.safetensors", integers=True),
            False,
        ),
        Target(
            "LoRA", work / "lora.safetensors", lambda: merge_one(work / "lora.safetensors"), False
        ),
        Target(
            "adapter_config.json",
            adapter,
            lambda: merge_one(work / "peft" / "adapter_model.safetensors"),
        ),
        Target("latents", latents, lambda: read_latents(latents), False),
        Target("manifest", work / "engine" / "manifest.json", engine),
        Target(
            "judgment",
            put("run/judgment.json", judgment),
            lambda: make_report([work / "run"], taxonomy),
        ),
        Target("results", put("bench.json", bench), compare),
        *shown_targets(put),
        Target("results.jsonl", line, resume),
        Target(
            "prompts",
            put(
                "p.json",
                [
                    {
                        "id": "a",
                        "prompt": "x",
                        "seed": 1,
                        "size": "32x32",
                        "frames": 5,
                        "negative": "y",
                        "plan": "handoff=0.5",
                        "guidance": [4.0, 3.0],
                        "blend": {"split": "dct", "order": 2},
                        "timesteps": [999, 500],
                        "as_published": False,
                        "rewrite": "z",
                    },
                    "b",
                ],
            ),
            lambda: read_prompts(work / "p.json"),
        ),
        Target(
            "VR-Bench's file",
            put("v.json", json.loads(EXAMPLE.read_text())),
            lambda: (schema.read_bench(work / "v.json", taxonomy), read_prompts(work / "v.json")),
        ),
        Target(
            "taxonomy",
            put("t.json", json.loads(EXAMPLE.with_name("taxonomy.json").read_text())),
            lambda: schema.read_taxonomy(work / "t.json"),
        ),
        Target(
            "any object",
            put("o.json", {"a": [1, {"b": "c"}]}),
            lambda: (read_json(work / "o.json"), documents.read_object(work / "o.json")),
        ),
    ]
    if steered is not None:
        folder = shutil.copytree(steered, work / "connector")
        targets += [
            Target(
                "connector config.json",
                folder / "config.json",
                lambda: ConnectorConfig.from_dict(read_json(folder / "config.json")),
            ),
            Target(
                "connector", folder / "config.json", lambda: load_connector(folder, torch.float32)
            ),
            Target(
                "connector weights",
                folder / "model.safetensors",
                lambda: load_connector(folder, torch.float32),
                False,
            ),
        ]
    (work / "plans").mkdir()
    targets += fuzz_plans.make_targets(work / "plans", Target)
    (work / "serve").mkdir()
    targets += fuzz_serve.make_targets(work / "serve", Target)
    (work / "files").mkdir()
    return targets + fuzz_files.make_targets(pair, work / "files", Target, mutated)
