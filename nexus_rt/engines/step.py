"""A step in one session run: both generators, guidance and blend in one graph (`nexus-rt export --fuse-step`)."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.engines.exported import EngineContext, Exported, run_context
from nexus_rt.errors import InputError
from nexus_rt.size import ClipSize


class StepEngine(Exported):
    """Graphs "step", "context_small" and "context_large"."""

    def prepare(self, name: str, context: Tensor) -> EngineContext:
        """A generator's prompt, "small" or "large": embeddings [2 B, L, D], unconditional samples last."""
        self.load()
        return run_context(self, f"context_{name}", self.folder.manifest.architecture[name], context)

    @torch.no_grad()
    def step(
        self, latents: Tensor, timestep: Tensor, contexts: dict[str, EngineContext], inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The blended velocity of a guided step.

        Args:
            latents: [B, C, T, H, W] float32. timestep: scalar, 0..1000.
            contexts: of `prepare`, "small" and "large", batch 2 B. inputs: of `nexus_rt.upfb.step_inputs`.

        Returns:
            velocity [B, C, T, H, W] and the RMS of both guided velocities [2, B], float32.
        """
        self.check_size(ClipSize.of(latents))
        batch = latents.shape[0]
        if any(c.batch != 2 * batch for c in contexts.values()):
            raise InputError(f"a fused step of {batch} samples needs contexts of {2 * batch}, unconditional samples last.")
        self.load()
        velocity = torch.empty(latents.shape, device=self.device)
        rms = torch.empty(2, batch, device=self.device)
        given = {"latents": latents.float().contiguous(), "timestep": timestep.float().reshape(()).to(self.device)}
        for name, c in contexts.items():
            given |= {f"keys_{name}": c.keys, f"values_{name}": c.values, f"bias_{name}": c.bias}
        given |= {k: t.to(self.device).contiguous() for k, t in inputs.items()}
        ordered = {k: given[k] for k in self.sessions.graphs["step"]}
        self.sessions.run("step", ordered, {"velocity": velocity, "rms": rms})
        return velocity, rms
