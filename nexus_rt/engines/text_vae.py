"""The VAE's decoder and the text encoder as engines: the same calls as in PyTorch, on a backend's
sessions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.core.size import ClipSize
from nexus_rt.engines.exported_engine import DTYPES, Exported, Sessions
from nexus_rt.loading.tokenizer import load_tokenizer
from nexus_rt.models.coders import Decoder, Tokenized


class EngineDecoder(Exported, Decoder):
    """A Wan VAE's decoder: graph "first" makes a frame of a latent frame, "next" four of each that
    follows.

    What the convolutions remember of the frames before are tensors that go from call to call, so
    memory is that of four frames however long the clip is, and a clip may have any number of them.
    """

    bound = 2

    def __init__(self, sessions: Sessions) -> None:
        Exported.__init__(self, sessions)
        Decoder.__init__(
            self,
            sessions.folder.manifest.architecture,
            DTYPES[sessions.folder.manifest.precision],
            self.device,
        )
        # channels and scale of each
        self.states: list[list[int]] = sessions.folder.manifest.options["states"]

    def drop(self) -> None:
        self.unload()

    def working_bytes(self, size: ClipSize) -> int:
        """An estimate: the states twice, and six activations of four frames at the last width."""
        area, (channels, scale) = size.width * size.height // 64, self.states[-1]
        states = sum(2 * c * s * s * area for c, s in self.states)
        return (2 * states + 6 * 4 * channels * scale * scale * area) * self.dtype.itemsize

    def decode_video(self, z: Tensor) -> Tensor:
        self.check_size(ClipSize.of(z))
        return torch.cat([self._clip(sample) for sample in z.split(1)]).clamp_(-1, 1)

    def _clip(self, z: Tensor) -> Tensor:
        """One clip [1, C, T, H, W], a latent frame at a time."""
        _, _, frames, height, width = z.shape
        make = lambda count, c, s: torch.zeros(
            1, c, count, s * height, s * width, dtype=self.dtype, device=self.device
        )
        names = [f"state_{i}" for i in range(len(self.states))]
        states, spare = ([make(2, c, s) for c, s in self.states] for _ in range(2))
        out = []
        for i in range(frames):
            graph, made = ("next", self.temporal) if i else ("first", 1)
            inputs = {
                "latents": z[:, :, i : i + 1].contiguous(),
                **(dict(zip(names, states, strict=True)) if i else {}),
            }
            video = make(made, 3, self.spatial)
            self.sessions.run(
                graph,
                inputs,
                {"video": video, **{f"new_{n}": t for n, t in zip(names, spare, strict=True)}},
            )
            states, spare = spare, states
            out.append(video)
        return torch.cat(out, 2)


class EngineTextEncoder(Exported, Tokenized):
    """A UMT5 encoder: graph "encode", token ids and mask to hidden states.

    Args:
        tokenizer: its folder.
    """

    def __init__(self, sessions: Sessions, tokenizer: Path) -> None:
        Exported.__init__(self, sessions)
        read = partial(load_tokenizer, tokenizer, "text encoder's tokenizer")
        Tokenized.__init__(self, read, DTYPES[sessions.folder.manifest.precision], self.device)

    def drop(self) -> None:
        self.unload()

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        if ids.shape[1] < 2:  # a graph has no room for one token alone
            ids, mask = (torch.nn.functional.pad(t, (0, 1)) for t in (ids, mask))
            return self._states(ids, mask)[:, :1]
        if len(runs := self.together(len(ids))) > 1:
            return torch.cat([self._states(ids[r], mask[r]) for r in runs])
        width = self.folder.manifest.architecture["d_model"]
        out = torch.empty(*ids.shape, width, dtype=self.dtype, device=self.device)
        self.sessions.run(
            "encode", {"ids": ids.contiguous(), "mask": mask.contiguous()}, {"states": out}
        )
        return out
