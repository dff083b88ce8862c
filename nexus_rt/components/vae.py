"""Latents to pixels by the modules of diffusers' `AutoencoderKLWan`: small clips in one pass, large
ones frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import ModelError
from nexus_rt.core.log import chose
from nexus_rt.core.process import LOADING
from nexus_rt.core.size import ClipSize
from nexus_rt.loading.checkpoint import fill_exactly
from nexus_rt.loading.locate import folder_bytes, weights_of
from nexus_rt.loading.vae import diffusers_vae, empty_vae, vae_config, vae_space
from nexus_rt.memory.offload import Lazy
from nexus_rt.models.coders import Decoder
from nexus_rt.models.decoder import can_decode_whole, decode_whole
from nexus_rt.models.wan_vae import WanVae, in_channels_last

TILE_ABOVE = 1280 * 720  # pixels of a frame from which decoding is tiled when `tiling` is "auto"
# elements of the decoder's widest activation up to which a clip is decoded in one pass
WHOLE = 2**24


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
        empty_vae(self.folder)  # what does not fit is refused now, and not after the last step

    @property
    def model(self) -> Any:
        """diffusers' `AutoencoderKLWan`, on the tensors that are loaded; None where none are. Made
        when first asked for: a small clip is decoded without it."""
        if isinstance(self._held, WanVae):
            if self._whole is None:
                with LOADING, torch.device("meta"):
                    whole = diffusers_vae(vae_config(self.folder))
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
        model, stored = empty_vae(self.folder)
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

    def decode_video(self, z: Tensor) -> Tensor:
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
