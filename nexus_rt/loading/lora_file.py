"""What a LoRA file says: which parameter each of its keys changes, and by how much its products are
scaled.

Names read are those that publishers of Wan LoRAs use: diffusers' and PEFT's
(`transformer.blocks.0.attn1.to_q.lora_A.weight`), Wan's own
(`diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, `.diff`, `.diff_b`, and
`.diff_m` of the modulation tables), DiffSynth's (`pipe.dit.blocks...`), and kohya's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight`); each with PEFT's name of the adapter
(`.lora_A.default.weight`) or without, and with those of wrappers (`nexus_rt.loading.names`).

A product's scale is `alpha / rank` (`alpha / sqrt(rank)` where `use_rslora` is set). alpha is a
tensor `.alpha`, or is written in the safetensors header (`lora_adapter_metadata`, as diffusers
saves it) or in PEFT's `adapter_config.json` beside the file; 1.0 where nothing says.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.formats.safetensors import read_metadata
from nexus_rt.loading.layouts import diffusers_name
from nexus_rt.loading.names import WRAPPERS, plain_name

ENDINGS = {  # of a key -> what it is, and what is missing of the parameter's name
    ".lora_A.weight": ("down", ".weight"),
    ".lora_B.weight": ("up", ".weight"),
    ".lora_B.bias": ("up_bias", ".bias"),
    ".lora_down.weight": ("down", ".weight"),
    ".lora_up.weight": ("up", ".weight"),
    ".alpha": ("alpha", ".weight"),
    ".diff": ("add", ".weight"),
    ".diff_b": ("add", ".bias"),
    ".diff_m": ("add", ".modulation"),
}
# the name that PEFT gives an adapter, "default" or any other
ADAPTER = re.compile(r"\.(lora_(?:A|B|down|up))\.[^.]+\.(weight|bias)$")
PREFIX = re.compile(
    r"^(?:(?:base_model\.model|pipe|dit|diffusion_model|transformer(?:_2)?|model)\.)+"
)
SECOND = "transformer_2."  # in a prefix: of the expert for low noise
_LONGEST_FIRST = sorted(WRAPPERS, key=len, reverse=True)
KOHYA_PREFIX = re.compile(r"^(lora_unet_|lora_transformer_|lora_te0_|lycoris_)")
KOHYA = (  # underscores that were dots, where names have none of their own
    (KOHYA_PREFIX.pattern, ""),
    (rf"(?:(?<=_)|^)(?:{'|'.join(_LONGEST_FIRST)})_", ""),
    (r"^_*blocks_(\d+)_", r"blocks.\1."),
    (r"(self_attn|cross_attn)_(norm_[qk]|[qkvo])$", r"\1.\2"),
    (r"(attn[12])_to_out_0$", r"\1.to_out.0"),
    (r"(attn[12])_(to_[qkv]|norm_[qk])$", r"\1.\2"),
    (r"ffn_net_0_proj$", "ffn.net.0.proj"),
    (r"ffn_net_2$", "ffn.net.2"),
    (r"ffn_(\d)$", r"ffn.\1"),
    (r"^(text|time)_(embedding|projection)_(\d)$", r"\1_\2.\3"),
    (r"^head_head$", "head.head"),
    (
        r"^condition_embedder_(time|text)_embedder_linear_(\d)$",
        r"condition_embedder.\1_embedder.linear_\2",
    ),
    (r"^condition_embedder_time_proj$", "condition_embedder.time_proj"),
)
IMAGE = re.compile(
    r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_[kq]|image_embedder)([._]|$)"
)
# adapters made with these need other base weights than the published
CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
)
PATTERN_LENGTH = 200


@dataclass(frozen=True)
class Key:
    """A stored key: the parameter in diffusers' names, what it is to it ("down", "up", "alpha",
    "add", "up_bias"), the module as the file names it, and whether the file says that it is of
    `transformer_2`, the expert for low noise."""

    parameter: str
    kind: str
    module: str
    second: bool = False


def read_key(key: str) -> Key | None:
    """What a stored key is, with or without an adapter's name and those of wrappers; None for one
    that is none of a LoRA's."""
    key = ADAPTER.sub(r".\1.\2", plain_name(key))
    for ending, (kind, rest) in ENDINGS.items():
        if key.endswith(ending):
            whole = key[: -len(ending)]
            name = PREFIX.sub("", whole)
            second = SECOND in whole.removesuffix(name)
            if KOHYA_PREFIX.match(name):
                for pattern, replacement in KOHYA:
                    name = re.sub(pattern, replacement, name)
            return Key(diffusers_name(name + rest), kind, name, second)
    return None


def is_image_key(key: str) -> bool:
    """Whether a key belongs to the image branch of image-to-video models, which text-to-video ones
    lack."""
    return IMAGE.search(key) is not None


class _Config(msgspec.Struct):
    """Of PEFT's `LoraConfig`, what decides a merged weight."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    peft_type: str | None = "LORA"
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    fan_in_fan_out: bool = False
    use_qalora: bool = False
    layer_replication: list[list[int]] | None = None

    def refuse(self, where: str) -> None:
        """Raise where the adapter is no plain LoRA, or its numbers are none."""
        if (self.peft_type or "LORA").upper() != "LORA":
            raise ModelError(
                f"{where} is a {shorten(self.peft_type, 40)} adapter; only LORA is merged here.",
                code="unsupported",
                param="peft_type",
            )
        for on, name in (
            (self.use_dora, "use_dora"),
            (self.modules_to_save, "modules_to_save"),
            (self.alora_invocation_tokens, "alora_invocation_tokens"),
            (self.fan_in_fan_out, "fan_in_fan_out"),
            (self.use_qalora, "use_qalora"),
            (self.layer_replication, "layer_replication"),
        ):
            if on:
                raise ModelError(
                    f"{where} sets {name}, which a merge of plain LoRA would leave out; merge it"
                    " with PEFT first.",
                    code="unsupported",
                    param=name,
                )
        made = self.init_lora_weights
        if isinstance(made, str) and made.lower().startswith(CHANGES_BASE):
            raise ModelError(
                f"{where} sets init_lora_weights={shorten(made, 40)!r}, whose base weights are"
                f" not the"
                " published ones; convert the adapter with PEFT's"
                " path_initial_model_for_weight_conversion first.",
                code="unsupported",
                param="init_lora_weights",
            )
        for name, ranks in (("r", [self.r]), ("rank_pattern", (self.rank_pattern or {}).values())):
            if any(r < 1 for r in ranks):
                raise ModelError(
                    f"{where} sets {name} below 1; expected a LoRA's rank.",
                    code="out_of_range",
                    param=name,
                )
        for name, alphas in (
            ("lora_alpha", [self.lora_alpha]),
            ("alpha_pattern", (self.alpha_pattern or {}).values()),
        ):
            if not all(math.isfinite(a) for a in alphas):
                raise ModelError(
                    f"{where} sets {name} to a number that is not finite.",
                    code="not_finite",
                    param=name,
                )


@dataclass(frozen=True)
class Scaling:
    """Ranks and alphas that stand outside the tensors; where: for errors."""

    config: _Config
    where: str

    def rank(self, *modules: str) -> int:
        return self._match(self.config.rank_pattern, self.config.r, modules)

    def alpha(self, *modules: str) -> float:
        return self._match(self.config.alpha_pattern, self.config.lora_alpha, modules)

    def scale(self, rank: int, *modules: str) -> float:
        """What a module's product of `rank` is multiplied by; modules: its names in the layouts
        that a pattern may mean.

        Raises:
            ModelError: the rank said is not the tensors'.
        """
        if (stored := self.rank(*modules)) != rank:
            raise ModelError(
                f"{self.where} says rank {stored} of {modules[0]}, and its tensors have rank"
                f" {rank}.",
                code="mismatch",
            )
        return self.alpha(*modules) / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _match(
        self, patterns: dict[str, Any] | None, default: Any, modules: tuple[str, ...]
    ) -> Any:
        """The value of the first pattern that a name ends in at a dot, as PEFT matches its regular
        expressions."""
        for pattern, value in (patterns or {}).items():
            if any(self._ends(pattern, name) for name in modules):
                return value
        return default

    def _ends(self, pattern: str, name: str) -> bool:
        # the common case, and no regular expression can be slow on it
        if re.fullmatch(r"\^?[\w.]+\$?", pattern):
            plain = pattern.strip("^$")
            return name == plain or (not pattern.startswith("^") and name.endswith("." + plain))
        import regex  # comes with transformers; it has a time limit

        if len(pattern) > PATTERN_LENGTH:
            raise ModelError(
                f"{self.where}: a pattern has {len(pattern)} characters; expected at most"
                f" {PATTERN_LENGTH}.",
                code="too_large",
            )
        try:
            return regex.match(rf"(.*\.)?({pattern})$", name, timeout=0.5) is not None
        except (regex.error, TimeoutError) as error:
            raise ModelError(
                f"{self.where}: pattern {shorten(pattern, 80)!r} cannot be matched"
                f" ({shorten(error, 120)}).",
                code="unreadable",
            ) from None


def read_scaling(path: Path, second: bool = False) -> Scaling | None:
    """What the file's header or the `adapter_config.json` beside it says of scales; None where
    neither does.

    Args:
        second: of `transformer_2`, where the header tells the two apart.

    Raises:
        ModelError: damaged, no plain LoRA, or the two contradict each other.
    """
    scales = []
    if (text := read_metadata(path).get("lora_adapter_metadata")) is not None:
        where = f"{path}: lora_adapter_metadata"
        document = documents.parse(text, where)
        if not isinstance(document, dict):
            raise ModelError(
                f"{where} holds a {type(document).__name__}; expected an object, as diffusers"
                " writes it.",
                code="invalid_type",
            )
        under = lambda prefix: {
            k.removeprefix(prefix): v for k, v in document.items() if k.startswith(prefix)
        }
        own = (second and under(SECOND)) or under("transformer.") or under(SECOND)
        scales.append((own or {k: v for k, v in document.items() if "." not in k}, where))
    if (beside := path.with_name("adapter_config.json")).is_file():
        scales.append((documents.read_object(beside), str(beside)))
    scalings = []
    for values, where in scales:
        if not values.keys() & {"r", "lora_alpha"}:
            continue
        config = documents.check(
            {k: v for k, v in values.items() if k in _Config.__struct_fields__}, _Config, where
        )
        config.refuse(where)
        scalings.append(Scaling(config, where))
    if len(scalings) == 2 and any(
        getattr(scalings[0].config, f) != getattr(scalings[1].config, f)
        for f in ("r", "lora_alpha", "use_rslora")
    ):
        raise ModelError(
            f"{scalings[0].where} and {scalings[1].where} contradict each other; remove the wrong"
            " one.",
            code="conflict",
        )
    return scalings[0] if scalings else None


def module_names(key: Key) -> tuple[str, ...]:
    """A module as the file and as diffusers names it, without the parameter's own last part."""
    return tuple(dict.fromkeys((key.module, key.parameter.rpartition(".")[0])))
