"""The models of a pipeline and what runs them, written down once: options of the command line and
keywords of `NexusPipeline.from_pretrained` and `from_engines`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from nexus_rt.core.fields import described, fields_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from nexus_rt.loading.pair_folder import PairFolders

PARTS = ("small", "large", "vae", "text_encoder", "tokenizer", "understanding", "connector")
RECIPE = "how a few-step {} generator is run: lightx2v-4step | fastwan-3step"
LORA = "a LoRA to merge into the {} generator; may be given again"


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """Values by the names of options; None is an option that is not set."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Those of the options that belong here."""
        values = {n: options.get(f.flag) for n, f in fields_of(cls).items()}
        return cls(**{n: v for n, v in values.items() if v is not None})


class ModelSources(_Options, frozen=True, kw_only=True):
    """The sources of a pair's models, and how they are read.

    A generator's source is a folder, a hub id or a file, or two of them, "HIGH,LOW".
    """

    pretrained: Annotated[
        str | None,
        described(
            "a folder that holds small/, large/, vae/, text_encoder/, tokenizer/",
            flag="pair",
            metavar="DIR",
        ),
    ] = None
    small: Annotated[
        str | None,
        described(
            "the small generator: a folder, a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, a"
            " file (safetensors, GGUF), or two of these, HIGH,LOW, the experts of Wan 2.2",
            metavar="DIR",
        ),
    ] = None
    large: Annotated[
        str | None,
        described(
            "the large generator, such as Wan-AI/Wan2.1-T2V-14B-Diffusers",
            metavar="DIR",
        ),
    ] = None
    vae: Annotated[
        str | None,
        described("the VAE (default: that of --large, else of --small)", metavar="DIR"),
    ] = None
    text_encoder: Annotated[
        str | None,
        described("holds text_encoder/ and tokenizer/ (default: as --vae)", metavar="DIR"),
    ] = None
    boundary_ratio: Annotated[
        float | None,
        described(
            "of a generator of two experts: the share of the timesteps from which up the first runs"
            " (default: its folder's, else 0.875)",
            flag="boundary",
            metavar="SHARE",
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        described("the text encoder's, where it is not beside it", metavar="DIR"),
    ] = None
    understanding: Annotated[
        str | None,
        described("the language model that steers the small generator", metavar="DIR"),
    ] = None
    connector: Annotated[
        str | None,
        described("between the two (both: `nexus-rt convert omnivideo` makes them)", metavar="DIR"),
    ] = None
    small_lora: Annotated[
        tuple[str, ...], described(LORA.format("small"), metavar="FILE[@SCALE]")
    ] = ()
    large_lora: Annotated[
        tuple[str, ...], described(LORA.format("large"), metavar="FILE[@SCALE]")
    ] = ()
    weights: Annotated[
        Literal["dense", "small"] | None,
        described(
            "small: keep what a checkpoint stores in 8 bits or fewer as it is stored, and widen it"
            " layer by layer (default: dense)"
        ),
    ] = None
    quantize: Annotated[
        Literal["int8", "int8-dynamic", "fp8", "fp8-dynamic", "fp8-dynamic-all"] | None,
        described(
            "quantise the generators' matrices as they are read, a scale a row; -dynamic: the"
            " activations too; fp8-dynamic leaves the first and the last block as they are,"
            " fp8-dynamic-all does not"
        ),
    ] = None
    small_recipe: Annotated[str | None, described(RECIPE.format("small"), metavar="NAME")] = None
    large_recipe: Annotated[str | None, described(RECIPE.format("large"), metavar="NAME")] = None
    device: Annotated[
        str | None, described("cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    ] = None
    local_files_only: Annotated[bool, described("never ask the hub")] = False

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of `NexusPipeline.from_pretrained`."""
        own = {n: getattr(self, n) for n in self.__struct_fields__ if n != "quantize"}
        return {**own, "weights": self.quantize or self.weights or "dense"}

    def find(self) -> tuple[str | Path | None, PairFolders]:
        """The pair's source, the mini pair's where none is named, and where its parts lie.

        Raises:
            ModelError, InputError: as `find_pair`.
        """
        from nexus_rt.loading.pair_folder import MINI, find_pair

        named = self.pretrained or self.small or self.large
        pretrained = self.pretrained if named else MINI
        parts = {n: source for n in PARTS if (source := getattr(self, n)) is not None}
        hub = {"local_files_only": self.local_files_only}
        return pretrained, find_pair(pretrained, parts, hub, self.boundary_ratio)


class RunOptions(_Options, frozen=True, kw_only=True):
    """What runs the models: exported engines or PyTorch, its kernels, and how memory is used."""

    engines: Annotated[
        str | None,
        described("exported engines (`nexus-rt export`) instead of models", metavar="DIR"),
    ] = None
    force: Annotated[bool, described("with --engines: load one that failed its parity gate")] = (
        False
    )
    vram: Annotated[
        str | None,
        described(
            "a memory budget such as 24GB: weights come and go to keep within it", metavar="SIZE"
        ),
    ] = None
    cuda_graphs: Annotated[bool, described("record each generator's step once and replay it")] = (
        False
    )
    backend: Annotated[str, described("what runs the models: torch (default)")] = "torch"
    kernels: Annotated[
        str, described("blend, solver, norms and RoPE by torch | triton | auto (default)")
    ] = "auto"
    attention: Annotated[
        str,
        described(
            "auto (default) | auto-fp8 | sdpa | flash | cudnn | math | triton | triton-fp8 | fa3 |"
            " sage"
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        described(
            "data type of generators and encoders (default: bfloat16 on a GPU, float32 on a CPU)"
        ),
    ] = None
