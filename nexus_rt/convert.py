"""Published OmniVideo checkpoints to one folder that `NexusPipeline.from_pretrained` reads.

    nexus-rt convert omnivideo SRC DST

SRC is the published folder; its pickles are read without running them, one tensor at a time. DST holds `small/`,
`vae/`, `text_encoder/`, `tokenizer/`, `understanding/`, `connector/`, `model_index.json`, all safetensors, and
`conversion.json`, which accounts for every key of SRC: used, overridden or unused. DST appears only when complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.errors import InputError, ModelError
from nexus_rt.models import load
from nexus_rt.models.checkpoint import diffusers_name, diffusers_shapes, find_tensors, read_tensors
from nexus_rt.models.connector import SPECIAL_TOKENS, Connector, ConnectorConfig
from nexus_rt.models.pickles import read_pickle, read_state
from nexus_rt.models.understanding import Template
from nexus_rt.models.wan import WanConfig, WanTransformer

SHARD_BYTES = 2 * 10**9
LAYOUT = {  # part of the published folder -> where it lies
    "transformer": "transformer/model.pt",
    "adapter": "adapter/model.pt",
    "vision_head": "vision_head/vision_head/pytorch_model.bin",
    "wan": "wan/wanxiang1_3b",
    "t5": "wan/wanxiang1_3b/models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "wan/wanxiang1_3b/google/umt5-xxl",
    "vae": "wan/wanxiang1_3b/Wan2.1_VAE.pth",
    "llm": "ar_model/checkpoint/llm",
    "context": "unconditioned_context/context.pkl",
    "tokens": "special_tokens/tokens.pkl",
}
T5_NAMES = [  # Wan's own UMT5 -> transformers' UMT5EncoderModel
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]


@dataclass
class Report:
    """What became of every key, by source file."""

    used: dict[str, int] = field(default_factory=dict)
    overridden: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def add(self, source: str, used: int, overridden: Iterable[str] = (), unused: Iterable[str] = ()) -> None:
        self.used[source] = used
        for kept, names in ((self.overridden, overridden), (self.unused, unused)):
            if listed := sorted(names):
                kept[source] = listed

    def __str__(self) -> str:
        lines = []
        for source, count in self.used.items():
            over, left = self.overridden.get(source, []), self.unused.get(source, [])
            extra = [f"{len(over)} overridden by the whole model's"] if over else []
            extra += [f"{len(left)} unused ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})"] if left else []
            lines.append(f"{source}: {count} used" + "".join(f", {e}" for e in extra))
        return "\n".join(lines)


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> None:
    """Write tensors as safetensors, in files of at most about `limit` bytes with an index where there are several."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, folder / f"part-{len(names)}.safetensors", {"format": "pt"})
        names.append(list(shard))
        shard, size = {}, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush()
        shard[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    count, weight_map = len(names), {}
    for i, own in enumerate(names):
        file = f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        os.replace(folder / f"part-{i}.safetensors", folder / file)
        weight_map |= dict.fromkeys(own, file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _check(source: Path, got: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise unless every wanted tensor is there with its shape."""
    lost = sorted(wanted.keys() - got.keys())
    if lost:
        raise ModelError(f"{source} lacks {len(lost)} tensors ({', '.join(lost[:3])}); get the published files again.")
    for name, shape in wanted.items():
        if got[name] != tuple(shape):
            raise ModelError(f"{source}: {name} has shape {got[name]}; expected {tuple(shape)}.")


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


class Omnivideo:
    """One conversion: the source, the folder being filled, and the account of keys."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target, self.report = source, target, Report()
        # the whole mixed model's state dict, laid non-strictly over its parts
        self.mixed = read_state(self.part("transformer"), "module", "model_state_dict", "state_dict")
        self.taken: set[str] = set()

    def part(self, name: str) -> Path:
        path = self.source / LAYOUT[name]
        if not path.exists():
            raise ModelError(f"{path} is missing; expected the OmniVideo folder as it was published.")
        return path

    def over(self, prefix: str) -> dict[str, Tensor]:
        """The mixed model's tensors under a prefix, without it."""
        found = {k: v for k, v in self.mixed.items() if k.startswith(prefix)}
        self.taken |= found.keys()
        return {k.removeprefix(prefix): v for k, v in found.items()}

    def transformer(self) -> None:
        """`small/`: Wan 1.3B with the mixed model's weights over it."""
        folder = self.part("wan")
        config = load.load_config(folder)
        stored = {diffusers_name(k): v for k, v in find_tensors(folder).items()}
        over = {diffusers_name(k): v for k, v in self.over("wan_model.").items()}
        with torch.device("meta"):
            wanted = diffusers_shapes(WanTransformer(config))
        shapes = {k: v.shape for k, v in stored.items()} | {k: tuple(v.shape) for k, v in over.items()}
        _check(folder, shapes, wanted)
        base = {k: v for k, v in stored.items() if k in wanted and k not in over}

        def tensors() -> Iterable[tuple[str, Tensor]]:
            yield from read_tensors(base.items())
            yield from ((k, v) for k, v in over.items() if k in wanted)

        write_shards(self.target / "small", "diffusion_pytorch_model", tensors())
        _write_json(self.target / "small" / "config.json", transformer_config(config))
        self.report.add(LAYOUT["wan"], len(base), stored.keys() & over.keys(), stored.keys() - wanted.keys())
        self.report.unused.setdefault(LAYOUT["transformer"], []).extend(
            sorted(f"wan_model.{k}" for k in over.keys() - wanted.keys())
        )

    def connector(self) -> None:
        """`connector/`: vision head, adapter, special tokens, and what guidance is measured against."""
        sources = {
            "vision_head": (read_state(self.part("vision_head")), self.over("ar_vision_head.")),
            "adapter": (read_state(self.part("adapter"), "model_state_dict", "state_dict"), self.over("adapter.")),
        }
        merged = {f"{name}.{k}": v for name, (own, over) in sources.items() for k, v in {**own, **over}.items()}
        config = connector_config(merged, self.part("vision_head"))
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in Connector(config).state_dict().items()}
        _check(self.part("adapter"), {k: tuple(v.shape) for k, v in merged.items()}, wanted)
        folder = self.target / "connector"
        write_shards(folder, "model", ((k, v) for k, v in merged.items() if k in wanted))
        config.save(folder)
        for name, (own, over) in sources.items():
            left = [k for k in own if f"{name}.{k}" not in wanted]
            self.report.add(LAYOUT[name], len(own.keys() - over.keys()) - len(left), own.keys() & over.keys(), left)

        rows = lambda value, width: torch.as_tensor(value).reshape(-1, width)  # noqa: E731
        tokens = read_pickle(self.part("tokens"))
        lost = [t for t in SPECIAL_TOKENS if t not in tokens] if isinstance(tokens, dict) else list(SPECIAL_TOKENS)
        if lost:
            raise ModelError(f"{self.part('tokens')} lacks the special tokens {', '.join(lost)}; get the published file again.")
        try:
            special = {t: rows(tokens[t], config.text_dim) for t in SPECIAL_TOKENS}
            context = read_pickle(self.part("context"))
            unconditional = {
                "text": rows(context["text_emb"], config.text_dim),
                "hidden": rows(context["vlm_last_hidden_states"], config.llm_hidden_size),
            }
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.part('context').parent.name} and {self.part('tokens').parent.name} do not fit the connector ({error}); "
                f"expected text_emb and tokens of width {config.text_dim}, vlm_last_hidden_states of {config.llm_hidden_size}."
            ) from error
        write_shards(folder, "special_tokens", special.items())
        write_shards(folder, "unconditional", unconditional.items())
        self.report.add(LAYOUT["tokens"], len(special), unused=tokens.keys() - special.keys())
        self.report.add(LAYOUT["context"], 2, unused=context.keys() - {"text_emb", "vlm_last_hidden_states"})

    def text(self) -> None:
        """`text_encoder/` and `tokenizer/`."""
        from transformers import UMT5Config, UMT5EncoderModel

        path = self.part("t5")
        state = read_state(path)
        stored = {t5_name(k): v for k, v in state.items()}
        try:
            bias = stored["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            query = stored["encoder.block.0.layer.0.SelfAttention.q.weight"]
            up = stored["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]
            vocab = stored["shared.weight"]
        except KeyError as error:
            raise ModelError(f"{path} is no UMT5 encoder of Wan's: it lacks {error}; get the published file again.") from error
        layers = 1 + max(int(k.split(".")[2]) for k in stored if k.startswith("encoder.block."))
        config = UMT5Config(
            vocab_size=vocab.shape[0], d_model=vocab.shape[1], d_kv=query.shape[0] // bias.shape[1], d_ff=up.shape[0],
            num_layers=layers, num_heads=bias.shape[1], relative_attention_num_buckets=bias.shape[0], dropout_rate=0.0,
            feed_forward_proj="gated-gelu", architectures=["UMT5EncoderModel"],
        )  # fmt: skip
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        wanted = {k: tuple(v.shape) for k, v in model.named_parameters()}
        _check(path, {k: tuple(v.shape) for k, v in stored.items()}, wanted)
        write_shards(self.target / "text_encoder", "model", ((k, v) for k, v in stored.items() if k in wanted))
        config.save_pretrained(self.target / "text_encoder")
        self.report.add(LAYOUT["t5"], len(wanted), unused=stored.keys() - wanted.keys())
        shutil.copytree(self.part("tokenizer"), self.target / "tokenizer")

    def vae(self) -> None:
        """`vae/`, by diffusers' own names for Wan's."""
        from diffusers import AutoencoderKLWan
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        path = self.part("vae")
        state = read_state(path)
        stored = convert_wan_vae_to_diffusers(dict(state))
        base, z = stored.get("encoder.conv_in.weight"), stored.get("post_quant_conv.weight")
        if base is None or z is None:
            raise ModelError(f"{path} is no Wan VAE: it lacks encoder.conv1 or conv2; get the published file again.")
        with torch.device("meta"):
            model = AutoencoderKLWan(base_dim=base.shape[0], z_dim=z.shape[0])
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        _check(path, {k: tuple(v.shape) for k, v in stored.items()}, wanted)
        write_shards(self.target / "vae", "diffusion_pytorch_model", ((k, v) for k, v in stored.items() if k in wanted))
        model.save_config(self.target / "vae")
        self.report.add(LAYOUT["vae"], len(wanted), unused=stored.keys() - wanted.keys())

    def understanding(self) -> None:
        """`understanding/`: the language model as it is; its safetensors are linked where the disk allows it."""
        folder = self.part("llm")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{folder} holds no safetensors; save the language model with transformers' save_pretrained first."
            )
        count = len(find_tensors(folder))
        target = self.target / "understanding"
        target.mkdir()
        skipped = []
        for file in sorted(folder.iterdir()):
            if file.suffix in (".bin", ".pt", ".pth", ".pkl") or not file.is_file():
                skipped.append(file.name)
                continue
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)
        self.report.add(LAYOUT["llm"], count, unused=skipped)

    def finish(self) -> None:
        name = LAYOUT["transformer"]
        left = self.mixed.keys() - self.taken
        unused = [*self.report.unused.pop(name, []), *left]
        self.report.add(name, len(self.mixed) - len(unused), unused=unused)
        _write_json(self.target / "model_index.json", {"_class_name": "NexusPipeline", "defaults": {}})
        report = {"source": "omnivideo", **vars(self.report)}
        _write_json(self.target / "conversion.json", report)


def t5_name(name: str) -> str:
    """A parameter of Wan's own UMT5, as transformers' `UMT5EncoderModel` names it."""
    for pattern, replacement in T5_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def transformer_config(config: WanConfig) -> dict:
    """diffusers' `config.json` of a text-to-video Wan transformer."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    extra = {
        "_class_name": "WanTransformer3DModel",
        "qk_norm": "rms_norm_across_heads",
        "added_kv_proj_dim": None,
        "image_dim": None,
    }
    return {**extra, **fields}


def connector_config(weights: dict[str, Tensor], source: Path) -> ConnectorConfig:
    """Dimensions as the weights have them; eight heads, as `nn.Transformer` has where it is not told."""
    try:
        head, adapter = weights["vision_head.decoder_query"], weights["adapter.decoder_query"]
        width = weights["vision_head.fc.0.weight"].shape[1]
    except KeyError as error:
        raise ModelError(f"{source}: the vision head or the adapter lacks {error}; get the published files again.") from error
    layers = {int(k.split(".")[4]) for k in weights if k.startswith("adapter.adapter.encoder.layers.")}
    return ConnectorConfig(
        llm_hidden_size=width, vision_dim=head.shape[-1], vision_queries=head.shape[1], text_dim=adapter.shape[-1],
        adapter_queries=adapter.shape[1], num_layers=len(layers), template=Template(),
    )  # fmt: skip


def convert_omnivideo(source: str | Path, target: str | Path, say: Callable[[str], None] = lambda line: None) -> Report:
    """Convert a published OmniVideo folder; see the module's text.

    Args:
        say: told which part comes next.

    Raises:
        InputError: SRC is no folder, or DST exists.
        ModelError: a part is missing, damaged, refused or of other shapes; nothing is left behind.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; expected the published OmniVideo folder.")
    if target.exists():
        raise InputError(f"{target} exists; name a folder that does not, and the conversion will make it.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        job = Omnivideo(source, part)
        for step in (job.connector, job.transformer, job.vae, job.text, job.understanding):
            say(f"{step.__name__} ...")
            step()
        job.finish()
        os.replace(part, target)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}); free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return job.report
