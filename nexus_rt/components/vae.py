"""Latents to pixels by the modules of diffusers' `AutoencoderKLWan`: small clips in one pass, large
ones frame by frame."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from nexus_rt.core import documents
from nexus_rt.core.errors import DecodeError, ModelError, shorten
from nexus_rt.core.log import chose
from nexus_rt.core.process import LOADING
from nexus_rt.core.size import ClipSize
from nexus_rt.core.tracing import span
from nexus_rt.loading.architecture import vae_name, wan_vae_config
from nexus_rt.loading.checkpoint import compare, fill_exactly
from nexus_rt.loading.pretrained import check_config
from nexus_rt.loading.source import folder_bytes, read_json, warn_unread, weights_of
from nexus_rt.loading.stored import (
    StoredTensor,
    find_tensors,
    fitted,
    read_header,
    read_tensors,
    renamed,
)
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.decoder import can_decode_whole, decode_whole
from nexus_rt.models.wan_vae import WanVae, is_plain

TILE_ABOVE = 1280 * 720  # pixels of a frame from which decoding is tiled when `tiling` is "auto"
TOGETHER = (
    2**21
    # pixels (of all frames) decoded in one call: small clips gain four times from it, large ones go
    # alone
)
# elements of the decoder's widest activation up to which a clip is decoded in one pass
WHOLE = 2**24
LATENT_FIELDS = (
    "z_dim",
    "latents_mean",
    "latents_std",
    "scale_factor_spatial",
    "scale_factor_temporal",
)
# What AutoencoderKLWan has when a config.json leaves the field out: the published Wan 2.1 VAE's
# statistics.
WAN_VAE = {
    "z_dim": 16,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [
        -0.7571,
        -0.7089,
        -0.9113,
        0.1075,
        -0.1745,
        0.9653,
        -0.1517,
        1.5508,
        0.4134,
        -0.0715,
        0.5517,
        -0.3632,
        -0.1922,
        -0.9497,
        0.2503,
        -0.2921,
    ],
    "latents_std": [
        2.8184,
        1.4541,
        2.3275,
        2.6558,
        1.2196,
        1.7708,
        2.6052,
        2.0743,
        3.2687,
        2.1526,
        2.8652,
        1.5579,
        1.6382,
        1.1253,
        2.8251,
        1.9160,
    ],
}


Factor = Annotated[int, msgspec.Meta(ge=1, le=64)]


class _Blocks(msgspec.Struct):
    """What decides how many modules a VAE has; above these it is none, and building it would
    hang."""

    base_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 96
    decoder_base_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    dim_mult: Annotated[list[Factor], msgspec.Meta(min_length=1, max_length=8)] = msgspec.field(
        default_factory=lambda: [1]
    )
    num_res_blocks: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    attn_scales: Annotated[list[float], msgspec.Meta(max_length=16)] = msgspec.field(
        default_factory=list
    )
    temperal_downsample: Annotated[list[bool], msgspec.Meta(max_length=8)] = msgspec.field(
        default_factory=list
    )


FIELDS = {  # of AutoencoderKLWan's config
    *_Blocks.__struct_fields__,
    *LATENT_FIELDS,
    *("in_channels", "out_channels", "is_residual", "patch_size", "dropout"),
}


class _Space(msgspec.Struct):
    z_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    latents_mean: list[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]]
    latents_std: list[Annotated[float, msgspec.Meta(gt=0, le=1e6)]]
    scale_factor_spatial: Annotated[int, msgspec.Meta(ge=1, le=128)]
    scale_factor_temporal: Annotated[int, msgspec.Meta(ge=1, le=64)]


def _diffusers_vae(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(config)


def check_space(space: dict[str, Any], where: str) -> None:
    """Raise unless a latent space's numbers belong together; where: for errors."""
    stored = documents.check(space, _Space, where)
    if not len(stored.latents_mean) == len(stored.latents_std) == stored.z_dim:
        raise ModelError(
            f"{where} has {len(stored.latents_mean)} means and {len(stored.latents_std)} deviations"
            f" of latents for z_dim={stored.z_dim} channels; expected one of each a channel.",
            code="mismatch",
        )


def vae_config(source: Path) -> dict[str, Any]:
    """A VAE's config: of its folder, or what its tensors' shapes say.

    Raises:
        ModelError: no folder or file of a Wan VAE.
    """
    if source.is_dir():
        return read_json(source / "config.json")
    stored = renamed(find_tensors(source), vae_name)
    return wan_vae_config({n: t.shape for n, t in stored.items()}, source)


def vae_space(source: Path) -> dict[str, Any]:
    """What of a VAE's config defines its latent space."""
    config = vae_config(source)
    space = {field: config.get(field, WAN_VAE[field]) for field in LATENT_FIELDS}
    check_space(space, f"{source}/config.json" if source.is_dir() else str(source))
    return space


def in_channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """A VAE with its 3-D convolutions' weights in the layout in which a CPU is about twice as
    fast."""
    for parameter in model.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return model


class Decoder:
    """Latents to frames, whatever computes them; `space` is `vae_space` of the VAE. Subclasses add
    `load` and `_video`."""

    def __init__(self, space: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.space, self.dtype, self.device = space, dtype, device

    @property
    def spatial(self) -> int:
        """Pixels per latent cell."""
        return int(self.space["scale_factor_spatial"])

    @property
    def temporal(self) -> int:
        """Frames per latent frame, after the first."""
        return int(self.space["scale_factor_temporal"])

    def load(self) -> None:
        """Make the weights ready, if they are not."""
        raise NotImplementedError

    def _video(self, z: Tensor) -> Tensor:
        """The VAE's own latents [B, C, T, H, W] to frames [B, 3, F, 8 H, 8 W] in [-1, 1]."""
        raise NotImplementedError

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(self.space[k], device=device).view(1, -1, 1, 1, 1)
            for k in ("latents_mean", "latents_std")
        )
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor, rescue: str | Path | None = None) -> Tensor:
        """Normalised latents [B, C, T, H, W] to frames [B, F, 3, H, W] in [0, 1], float32; large
        clips one at a time.

        Args:
            rescue: where to save the latents if decoding fails: a folder (default, and where it is
                full or cannot be written: the system's temporary one).

        Raises:
            DecodeError: anything went wrong, running out of memory included; carries the path of
                the saved latents.
        """
        try:
            self.load()
            height, width = (s * self.spatial for s in latents.shape[-2:])
            mean, std = self._statistics(self.device)
            out = []
            frames = (latents.shape[2] - 1) * self.temporal + 1
            together = max(1, TOGETHER // (frames * height * width))
            for sample in latents.to(self.device, torch.float32).split(together):
                with span("vae"):
                    video = self._video((sample * std + mean).to(self.dtype))
                out.append(video.float().add_(1).div_(2).clamp_(0, 1))
            return torch.cat(out).transpose(1, 2)
        except Exception as error:
            # a folder that is not there is the caller's mistake
            named = rescue is not None and not Path(rescue).is_dir()
            path = save_latents(latents, rescue) if named else rescue_latents(latents, rescue)
            saved = (
                f"the latents are saved in {path}; decode them again with `nexus-rt decode`"
                if path
                else "and saving them failed too"
            )
            raise DecodeError(
                f"decoding failed ({type(error).__name__}: {error}); {saved}.", path
            ) from error


class VideoDecoder(Lazy, Decoder):
    """A Wan VAE in PyTorch, loaded when first used and dropped when asked.

    Args:
        folder: holds `config.json` and safetensors in diffusers' layout; or a single file in
            diffusers' names or Wan's own.
        tiling: True, False, or "auto": decode in overlapping tiles above 1280 x 720, where memory
            would run out.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: str | torch.device,
        tiling: bool | str = "auto",
    ) -> None:
        self.folder, self.tiling = Path(folder), tiling
        super().__init__(vae_space(self.folder), dtype, torch.device(device))
        if not weights_of(self.folder):
            raise ModelError(
                f"{self.folder} holds no safetensors; expected an AutoencoderKLWan in diffusers'"
                " layout.",
                code="missing",
            )
        self._empty()  # what does not fit is found now, and not after the last step

    def _empty(self) -> tuple[torch.nn.Module, dict[str, StoredTensor]]:
        """The module on the meta device, and the stored tensors, which are exactly its own."""
        if self.folder.is_dir():
            check_config(self.folder, "VAE")
        config = vae_config(self.folder)
        warn_unread(config, FIELDS, self.folder / "config.json")
        known = {k: v for k, v in config.items() if k in _Blocks.__struct_fields__}
        documents.check(
            known,
            _Blocks,
            f"{self.folder}/config.json",
            remedy="it is no AutoencoderKLWan's: get it again",
        )
        if config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
            raise ModelError(
                f"{self.folder} holds a {shorten(config['_class_name'], 80)}; expected an"
                " AutoencoderKLWan.",
                code="unsupported",
                param="_class_name",
            )
        try:
            with torch.device("meta"):
                model = WanVae(config) if is_plain(config) else _diffusers_vae(config)
        except Exception as error:  # diffusers checks no value of a config
            raise ModelError(
                f"{self.folder}/config.json is no AutoencoderKLWan's ({shorten(error)}); get it"
                f" again."
            ) from error
        try:
            stored = renamed(find_tensors(self.folder), vae_name)
            shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            stored = fitted(stored, shapes)
            compare(stored, model, self.folder, "VAE")
        except ModelError as error:
            raise ModelError(
                f"{self.folder}: the VAE cannot be loaded: {error}",
                code=error.code,
                param=error.param,
            ) from error
        return model, stored

    @property
    def model(self) -> Any:
        """diffusers' `AutoencoderKLWan`, on the tensors that are loaded; None where none are. Made
        when first asked for: a small clip is decoded without it."""
        if isinstance(self._held, WanVae):
            if self._whole is None:
                with LOADING, torch.device("meta"):
                    whole = _diffusers_vae(vae_config(self.folder))
                for name, parameter in self._held.named_parameters():
                    owner, leaf = name.rpartition(".")[::2]
                    setattr(whole.get_submodule(owner), leaf, parameter)
                self._whole = whole.eval()
            return self._whole
        return self._held

    @model.setter
    def model(self, value: Any) -> None:
        self._held, self._whole = value, None

    _held: Any = None
    _whole: Any = None
    strips: Any = None  # rows that other processes decode (nexus_rt.parallel.strips)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights."""
        return folder_bytes(self.folder)

    def working_bytes(self, size: ClipSize) -> int:
        """An estimate: float32, four frames at a time or the whole clip, six activations of the
        decoder's last width (96 in Wan's)."""
        width = vae_config(self.folder).get("base_dim", 96)
        plane = width * size.width * size.height
        return 6 * plane * (size.frames if plane * size.frames <= WHOLE else 4) * 4

    def _read(self) -> torch.nn.Module:
        model, stored = self._empty()
        fill_exactly(model, stored, self.dtype, self.device)
        return in_channels_last(model).eval()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W] in [-1, 1] to normalised latents [B, C, T, H/8, W/8] (the
        posterior's mode), float32."""
        self.load()
        frames = frames.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last_3d)
        mean, std = self._statistics(self.device)
        return (self.model.encode(frames).latent_dist.mode().float() - mean) / std

    def _video(self, z: Tensor) -> Tensor:
        height, width = (s * self.spatial for s in z.shape[-2:])
        tiled = height * width > TILE_ABOVE if self.tiling == "auto" else bool(self.tiling)
        if self.tiling == "auto":
            chose(
                "VAE tiling",
                "on" if tiled else "off",
                f"frames of {width}x{height} against {TILE_ABOVE} pixels",
                once=True,
            )
        z = z.contiguous(memory_format=torch.channels_last_3d)
        if self.strips is not None:  # less memory than tiles, and no seams
            self.model.use_tiling = False
            return self.strips.decode(self.model, z)
        elements = (
            z.shape[0]
            * ((z.shape[2] - 1) * self.temporal + 1)
            * height
            * width
            * self._held.config.base_dim
        )
        if not tiled and elements <= WHOLE and can_decode_whole(self._held):
            return decode_whole(self._held, z)
        self.model.use_tiling = False
        if tiled:
            self.model.enable_tiling()
        return self.model.decode(z, return_dict=False)[0]


def save_latents(latents: Tensor, folder: str | Path | None = None) -> Path | None:
    """Save latents as safetensors under a new name in `folder`; None if that fails too."""
    from safetensors.torch import save_file

    try:
        root = Path(folder) if folder else Path(tempfile.gettempdir())
        path = root / f"nexus-rt-latents-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.safetensors"
        save_file({"latents": latents.detach().float().cpu().contiguous()}, path)
        return path
    except (
        Exception
    ):  # the caller is already reporting a failure: it must not be lost under this one
        return None


def rescue_latents(latents: Tensor, folder: str | Path | None = None) -> Path | None:
    """`save_latents` into a folder, else, where that cannot be written, into the system's temporary
    one."""
    return save_latents(latents, folder) or save_latents(latents)


def read_latents(path: str | Path) -> Tensor:
    """Latents that `save_latents` wrote."""
    try:
        stored = read_header(Path(path)).get("latents")
        if stored is None:
            raise ModelError("it has no tensor 'latents'", code="missing", param="latents")
        if len(stored.shape) != 5 or 0 in stored.shape:
            raise ModelError(
                f"its latents have shape {list(stored.shape)}; expected [batch, channels, frames,"
                " height, width]",
                code="mismatch",
                param="latents",
            )
        (_, latents), *_ = read_tensors([("latents", stored)])
        latents = latents.float()
        if not bool(latents.isfinite().all()):
            raise ModelError("its latents hold NaN or infinity", code="not_finite", param="latents")
    except ModelError as error:
        raise ModelError(
            f"{path} holds no latents ({shorten(error)}); expected a safetensors file with a tensor"
            " 'latents', as a failed decoding leaves it.",
            code=error.code,
            param=error.param,
        ) from error
    return latents
