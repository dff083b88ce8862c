"""A step in one session run: both generators, guidance and blend in one graph
(`nexus-rt export --fuse-step`)."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.engines.exported_engine import EngineContext, Exported, run_context
from nexus_rt.errors import InputError
from nexus_rt.size import ClipSize


class StepEngine(Exported):
    """Graphs "step", "context_small" and "context_large"."""

    def prepare(self, name: str, context: Tensor) -> EngineContext:
        """A generator's prompt, "small" or "large": embeddings [2 B, L, D], unconditional samples
        last."""
        self.load()
        batch = len(context) // 2
        both = [*range(batch)], [*range(batch, 2 * batch)]
        runs = [[i for samples in both for i in samples[r]] for r in self.together(batch)]
        return run_context(
            self, f"context_{name}", self.folder.manifest.architecture[name], context, runs
        )

    @torch.no_grad()
    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        contexts: dict[str, EngineContext],
        inputs: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The blended velocity of a guided step.

        Args:
            latents: [B, C, T, H, W] float32. timestep: scalar, 0..1000.
            contexts: of `prepare`, "small" and "large", batch 2 B. inputs: of
                `nexus_rt.upfb.step_inputs`.

        Returns:
            velocity [B, C, T, H, W] and the RMS of both guided velocities [2, B], float32.
        """
        self.check_size(ClipSize.of(latents))
        batch = latents.shape[0]
        if any(c.batch != 2 * batch for c in contexts.values()):
            raise InputError(
                f"a fused step of {batch} samples needs contexts of {2 * batch}, unconditional"
                " samples last."
            )
        self.load()
        latents, made = latents.float().contiguous(), []
        given: dict[str, Tensor] = {"timestep": timestep.float().reshape(()).to(self.device)}
        given |= {k: t.to(self.device).contiguous() for k, t in inputs.items()}
        for i, r in enumerate(self.together(batch)):
            given["latents"] = latents[r]
            for name, context in contexts.items():
                c = context.parts[i] if context.parts else context
                for kind, tensor in (("keys", c.keys), ("values", c.values), ("bias", c.bias)):
                    assert tensor is not None  # only a context in parts holds none
                    given[f"{kind}_{name}"] = tensor
            velocity = torch.empty(given["latents"].shape, device=self.device)
            rms = torch.empty(2, len(velocity), device=self.device)
            ordered = {k: given[k] for k in self.sessions.graphs["step"]}
            self.sessions.run("step", ordered, {"velocity": velocity, "rms": rms})
            made.append((velocity, rms))
        if len(made) == 1:
            return made[0]
        return torch.cat([v for v, _ in made]), torch.cat([r for _, r in made], 1)
