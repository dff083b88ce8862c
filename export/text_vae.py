"""The graphs of the VAE's decoder and of the text encoder.

first:   latents [1, C, 1, H, W] -> video [1, 3, 1, 8 H, 8 W], states
next:    latents, states -> video [1, 3, 4, 8 H, 8 W], states: the two last frames that every
    convolution over time saw
encode:  ids, mask [N, L] int64 -> states [N, L, D]

Before the first frame there is nothing, which is zeros: diffusers' decoder, whose modules these
graphs call, keeps None and a marker there, and the values are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import export

from nexus_rt.core.size import ClipSize
from nexus_rt.export.dynamic_shapes import Shape, Symbols, Traced
from nexus_rt.models.umt5 import Umt5Encoder


class DecoderGraph(nn.Module):
    """One latent frame through the decoder; states: channels and scale of each
    (`decoder_states`)."""

    def __init__(self, vae: Any, first: bool, states: list[tuple[int, int]]) -> None:
        super().__init__()
        self.quant, self.decoder, self.first, self.shapes = (
            vae.post_quant_conv,
            vae.decoder,
            first,
            states,
        )

    def forward(self, latents: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        cache = [None] * len(self.shapes) if self.first else list(states)
        video = self.decoder(
            self.quant(latents), feat_cache=cache, feat_idx=[0], first_chunk=self.first
        )
        n, (h, w) = latents.shape[0], latents.shape[-2:]
        out = []
        for (channels, scale), kept in zip(self.shapes, cache, strict=True):
            # a temporal upsampling that the first frame goes round
            if not isinstance(kept, Tensor):
                kept = latents.new_zeros(n, channels, 2, scale * h, scale * w)
            elif kept.shape[2] < 2:
                kept = torch.cat([torch.zeros_like(kept), kept], 2)
            out.append(kept)
        return (video, *out)


@torch.no_grad()
def decoder_states(vae: Any) -> list[tuple[int, int]]:
    """Channels and scale of what the decoder's convolutions remember, by running two frames of 2 x
    2 latent cells; a VAE on the meta device will do."""
    parameter = next(vae.parameters())
    z = vae.post_quant_conv(
        torch.zeros(1, vae.config.z_dim, 1, 2, 2, dtype=parameter.dtype, device=parameter.device)
    )
    cache: list[Any] = [None] * 256  # more than any decoder has
    vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=True)
    vae.decoder(z, feat_cache=cache, feat_idx=[0])
    return [(c.shape[1], c.shape[-1] // 2) for c in cache if c is not None]


@torch.no_grad()
def trace_decoder(vae: Any, buckets: list[ClipSize]) -> dict[str, Traced]:
    """Both graphs of a VAE at sizes."""
    states, symbols, parameter = decoder_states(vae), Symbols(buckets), next(vae.parameters())
    names = [f"state_{i}" for i in range(len(states))]
    latents: Shape = (1, vae.config.z_dim, 1, "2*rows", "2*columns")
    between: dict[str, Shape] = {
        n: (1, c, 2, f"{2 * s}*rows", f"{2 * s}*columns")
        for n, (c, s) in zip(names, states, strict=True)
    }
    outputs = ("video", *(f"new_{n}" for n in names))
    graphs = {}
    for graph, shapes in (
        ("first", {"latents": latents}),
        ("next", {"latents": latents, **between}),
    ):
        inputs = {
            n: symbols.random(shape, parameter.dtype, parameter.device)
            for n, shape in shapes.items()
        }
        given = inputs["latents"], [inputs[n] for n in names if n in inputs]
        dynamic = (
            symbols.dynamic(latents),
            [symbols.dynamic(shapes[n]) for n in names if n in shapes],
        )
        module = DecoderGraph(vae, graph == "first", states).eval()
        graphs[graph] = Traced(
            export(module, given, dynamic_shapes=dynamic, strict=False), inputs, shapes, outputs
        )
    return graphs


@torch.no_grad()
def trace_text(model: Umt5Encoder) -> dict[str, Traced]:
    """The graph of a UMT5 encoder, for any number of prompts of 2 to 512 tokens; the padding's rows
    are set to zero outside, as `Tokenized.encode` does for every backend."""
    symbols, device = Symbols([]), next(model.parameters()).device
    shape: Shape = ("batch", "words")
    ids = symbols.random(shape).mul_(1000).long().abs().to(device) % model.config.vocab_size
    inputs = {"ids": ids, "mask": torch.ones_like(ids)}
    dynamic = symbols.dynamic(shape)
    program = export(model, tuple(inputs.values()), dynamic_shapes=(dynamic, dynamic), strict=False)
    return {"encode": Traced(program, inputs, dict.fromkeys(inputs, shape), ("states",))}
