"""Published OmniVideo checkpoints to one folder that `NexusPipeline.from_pretrained` reads.

    nexus-rt convert omnivideo SRC DST

SRC is the published folder; its pickles are read without running them, one tensor at a time. DST
holds `small/`, `vae/`, `text_encoder/`, `tokenizer/`, `understanding/`, `connector/`,
`model_index.json`, all safetensors, and `conversion.json`, which accounts for every key of SRC:
used, overridden or unused. DST appears only when complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, ModelError, shorten
from nexus_rt.core.limits import PLAN
from nexus_rt.core.paths import as_path
from nexus_rt.loading import transformer
from nexus_rt.loading.architecture import wan_config
from nexus_rt.loading.config import write_json
from nexus_rt.loading.connector import save_config
from nexus_rt.loading.convert_config import check_inside, connector_config, unconditional_rows
from nexus_rt.loading.convert_parts import (
    Report,
    check_shapes,
    made_whole,
    write_text_encoder,
    write_transformer,
    write_vae,
)
from nexus_rt.loading.formats.pickles import read_pickle, read_state
from nexus_rt.loading.formats.safetensors import Index, write_shards
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.layouts import diffusers_name, diffusers_shapes
from nexus_rt.loading.locate import PICKLES
from nexus_rt.loading.lora_file import is_image_key
from nexus_rt.loading.names import refuse_unused
from nexus_rt.loading.tensors import find_tensors, renamed
from nexus_rt.models.connector import SPECIAL_TOKENS, TEXT_MARKERS, Connector, ConnectorConfig
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig

LAYOUT = {  # part of the published folder -> where it lies
    "transformer": "transformer/model.pt",
    "adapter": "adapter/model.pt",
    "vision_head": "vision_head/vision_head/pytorch_model.bin",
    "wan": "wan/wanxiang1_3b",
    "wan_14b": "Wan2.1-T2V-14B",
    "t5": "wan/wanxiang1_3b/models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "wan/wanxiang1_3b/google/umt5-xxl",
    "vae": "wan/wanxiang1_3b/Wan2.1_VAE.pth",
    "llm": "ar_model/checkpoint/llm",
    "context": "unconditioned_context/context.pkl",
    "tokens": "special_tokens/tokens.pkl",
}


class Omnivideo:
    """One conversion: the source, the folder being filled, and the account of keys."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target, self.report = source, target, Report()
        # the whole mixed model's state dict, laid non-strictly over its parts
        self.mixed = self.optional("transformer", "module", "model_state_dict", "state_dict")
        self.taken: set[str] = set()

    def part(self, name: str) -> Path:
        path = self.source / LAYOUT[name]
        if not path.exists():
            raise ModelError(
                f"{path} is missing; expected the OmniVideo folder as it was published.",
                code="not_found",
            )
        return path

    def optional(self, name: str, *wrappers: str) -> dict[str, Tensor]:
        """A part's state dict; empty, and said so, where the file is absent: the others may hold
        all of it."""
        if (self.source / LAYOUT[name]).exists():
            return read_state(self.part(name), *wrappers)
        self.report.notes[LAYOUT[name]] = "absent; what it would hold is taken from the other files"
        return {}

    def over(self, prefix: str) -> dict[str, Tensor]:
        """The mixed model's tensors under a prefix, without it."""
        members = {k: v for k, v in self.mixed.items() if k.startswith(prefix)}
        self.taken |= members.keys()
        return {k.removeprefix(prefix): v for k, v in members.items()}

    def transformer(self) -> None:
        """`small/`: Wan 1.3B with the mixed model's weights over it."""
        self._generator("small", self.part("wan"), LAYOUT["wan"], "wan_model.")

    def large(self) -> None:
        """`large/`, where the mixed model holds tensors of it (`wan_2_model.*`): over Wan 14B's, or
        alone where whole."""
        if not any(k.startswith("wan_2_model.") for k in self.mixed):
            return
        self._generator("large", self.source / LAYOUT["wan_14b"], LAYOUT["wan_14b"], "wan_2_model.")

    def _generator(self, name: str, folder: Path, label: str, prefix: str) -> None:
        over: dict[str, Tensor] = {}
        for key, value in self.over(prefix).items():
            if diffusers_name(key) in over:
                raise ModelError(
                    f"{self.source / LAYOUT['transformer']} holds {prefix}{key} twice, under two"
                    " names.",
                    code="duplicate",
                )
            over[diffusers_name(key)] = value
        if folder.is_dir():
            config, stored = (
                transformer.load_config(folder),
                renamed(find_tensors(folder), diffusers_name),
            )
        else:
            config, stored = self._alone(over, folder), {}
            self.report.notes[label] = (
                f"absent; all of {name} is {prefix}* of {LAYOUT['transformer']}"
            )
        with torch.device("meta"):
            wanted = diffusers_shapes(WanTransformer(config))
        shapes = {k: v.shape for k, v in stored.items()} | {
            k: tuple(v.shape) for k, v in over.items()
        }
        check_shapes(folder, shapes, wanted)
        unused = {k for k in (*stored, *over) if k not in wanted and not is_image_key(k)}
        refuse_unused(unused, self.source / LAYOUT["transformer"], f"{name} generator")
        base = {k: v for k, v in stored.items() if k in wanted and k not in over}

        def tensors() -> Iterable[tuple[str, Tensor]]:
            yield from read_tensors(base.items())
            yield from ((k, v) for k, v in over.items() if k in wanted)

        write_transformer(self.target / name, config, tensors())
        self.report.add(
            label, len(base), stored.keys() & over.keys(), stored.keys() - wanted.keys()
        )
        self.report.unused.setdefault(LAYOUT["transformer"], []).extend(
            sorted(f"{prefix}{k}" for k in over.keys() - wanted.keys())
        )

    def _alone(self, over: dict[str, Tensor], folder: Path) -> WanConfig:
        """The architecture of a generator that the mixed model holds whole."""
        try:
            return wan_config({k: tuple(v.shape) for k, v in over.items()}, folder)
        except ModelError as error:
            raise ModelError(
                f"{folder} is missing, and the mixed model lacks part of that generator ({error});"
                " put Wan's folder there: what is tuned goes over its weights.",
                code="not_found",
            ) from None

    def connector(self) -> None:
        """`connector/`: vision head, adapter, special tokens, and what guidance is measured
        against."""
        sources = {
            "vision_head": (self.optional("vision_head"), self.over("ar_vision_head.")),
            "adapter": (
                self.optional("adapter", "model_state_dict", "state_dict"),
                self.over("adapter."),
            ),
        }
        merged = {
            f"{name}.{k}": v
            for name, (own, over) in sources.items()
            for k, v in {**own, **over}.items()
        }
        config = connector_config(merged, self.source)
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in Connector(config).state_dict().items()}
        check_shapes(
            self.source / LAYOUT["adapter"], {k: tuple(v.shape) for k, v in merged.items()}, wanted
        )
        folder = self.target / "connector"
        write_shards(folder, "model", ((k, v) for k, v in merged.items() if k in wanted))
        save_config(config, folder)
        for name, (own, over) in sources.items():
            left = [k for k in own if f"{name}.{k}" not in wanted]
            self.report.add(
                LAYOUT[name],
                len(own.keys() - over.keys()) - len(left),
                own.keys() & over.keys(),
                left,
            )

        self._markers(folder, config)
        self._unconditional(folder, config)

    def _markers(self, folder: Path, config: ConnectorConfig) -> None:
        """`special_tokens`: the rows that the parts of a context stand between."""
        path, tokens = self.part("tokens"), read_pickle(self.part("tokens"))
        lost = (
            [t for t in TEXT_MARKERS if t not in tokens]
            if isinstance(tokens, dict)
            else list(TEXT_MARKERS)
        )
        if lost:
            raise ModelError(
                f"{path} lacks the special tokens {', '.join(lost)}; get the published file again.",
                code="missing",
            )
        known = [t for t in SPECIAL_TOKENS if t in tokens]
        if absent := [t for t in SPECIAL_TOKENS if t not in tokens]:
            self.report.notes[LAYOUT["tokens"]] = (
                f"without {', '.join(absent)}, which text-to-video does not use"
            )
        special = {
            t: unconditional_rows(tokens[t], config.text_dim, f"{path}: {t}")[0] for t in known
        }
        write_shards(folder, "special_tokens", special.items())
        self.report.add(LAYOUT["tokens"], len(special), unused=tokens.keys() - special.keys())

    def _unconditional(self, folder: Path, config: ConnectorConfig) -> None:
        """`unconditional`: the embeddings that guidance is measured against."""
        path, context = self.part("context"), read_pickle(self.part("context"))
        keys = {
            "text": ("text_emb", config.text_dim),
            "hidden": ("vlm_last_hidden_states", config.llm_hidden_size),
        }
        lost = (
            [k for k, _ in keys.values() if k not in context]
            if isinstance(context, dict)
            else [k for k, _ in keys.values()]
        )
        if lost:
            raise ModelError(
                f"{path} lacks {' and '.join(lost)}; expected a dictionary that holds both.",
                code="missing",
            )
        rows, forms = {}, []
        for name, (key, width) in keys.items():
            rows[name], form = unconditional_rows(context[key], width, f"{path}: {key}")
            forms.append(f"{key} is {form}")
        write_shards(folder, "unconditional", rows.items())
        self.report.notes[LAYOUT["context"]] = ", ".join(forms)
        self.report.add(
            LAYOUT["context"], 2, unused=context.keys() - {key for key, _ in keys.values()}
        )

    def text(self) -> None:
        """`text_encoder/` and `tokenizer/`."""
        write_text_encoder(self.target, self.part("t5"), LAYOUT["t5"], self.report)
        shutil.copytree(self.part("tokenizer"), self.target / "tokenizer")

    def vae(self) -> None:
        """`vae/`."""
        write_vae(self.target, self.part("vae"), LAYOUT["vae"], self.report)

    def understanding(self) -> None:
        """`understanding/`: the language model as it is; its safetensors are linked where the disk
        allows it, `.bin` files read without running them and written as safetensors."""
        folder, target = self.part("llm"), self.target / "understanding"
        target.mkdir()
        safe = any(folder.glob("*.safetensors"))
        count = len(find_tensors(folder)) if safe else self._from_bins(folder, target)
        skipped = []
        for file in sorted(folder.iterdir()):
            if (
                file.suffix in PICKLES
                or not file.is_file()
                or (not safe and file.name.endswith(".bin.index.json"))
            ):
                skipped.append(file.name)
                continue
            check_inside(file, self.source)
            try:
                os.link(file.resolve(), target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)
        self.report.add(LAYOUT["llm"], count, unused=skipped)

    def _from_bins(self, folder: Path, target: Path) -> int:
        """transformers' `pytorch_model.bin`, whole or in shards, as safetensors."""
        files = sorted(folder.glob("pytorch_model*.bin"))
        index = folder / "pytorch_model.bin.index.json"
        if index.is_file():
            named = documents.read(index, Index).weight_map.values()
            if odd := [n for n in named if not re.fullmatch(r"[\w.-]+\.bin", n)]:
                raise ModelError(
                    f"{index} names {shorten(odd[0], 120)!r}; expected names of .bin files in its"
                    " folder.",
                    code="unsafe",
                )
            files = sorted({folder / n for n in named})
        if not files or (lost := [f.name for f in files if not f.is_file()]):
            what = (
                f"lacks {', '.join(lost)}"
                if files
                else "holds neither safetensors nor pytorch_model*.bin"
            )
            raise ModelError(f"{folder} {what}; get the published files again.", code="not_found")
        seen: dict[str, str] = {}

        def tensors() -> Iterable[tuple[str, Tensor]]:
            for file in files:
                for name, tensor in read_state(file).items():
                    if name in seen:
                        raise ModelError(
                            f"{folder}: {name} is in {seen[name]} and in {file.name}; get the files"
                            " again.",
                            code="duplicate",
                        )
                    seen[name] = file.name
                    yield name, tensor

        write_shards(target, "model", tensors())
        self.report.notes[LAYOUT["llm"]] = (
            f"{len(files)} pickled files, read safely and written as safetensors"
        )
        return len(seen)

    def finish(self) -> None:
        name = LAYOUT["transformer"]
        left = self.mixed.keys() - self.taken
        unused = [*self.report.unused.pop(name, []), *left]
        self.report.add(name, len(self.mixed) - len(unused), unused=unused)
        # The published scripts run both generators at every step: `--plan reference --as-published`
        # does as they do. A pair's default is the faster handoff, and is whatever its
        # model_index.json says.
        index = {"_class_name": "NexusPipeline", "defaults": {"plan": PLAN}}
        write_json(self.target / "model_index.json", index)
        report = {"source": "omnivideo", **vars(self.report)}
        write_json(self.target / "conversion.json", report)


def convert_omnivideo(
    source: str | Path, target: str | Path, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Convert a published OmniVideo folder; see the module's text.

    Args:
        say: told which part comes next.

    Raises:
        InputError: SRC is no folder, or DST exists.
        ModelError: a part is missing, damaged, refused or of other shapes; nothing is left behind.
    """
    source, target = as_path("source", source), as_path("target", target)
    if not source.is_dir():
        raise InputError(
            f"{source} is not a folder; expected the published OmniVideo folder.",
            code="not_found",
            param="source",
        )
    with made_whole(target) as part:
        job = Omnivideo(source, part)
        for step in (
            job.connector,
            job.transformer,
            job.large,
            job.vae,
            job.text,
            job.understanding,
        ):
            say(f"{step.__name__} ...")
            step()
        job.finish()
        return job.report
