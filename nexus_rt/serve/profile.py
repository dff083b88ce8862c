"""What of a pipeline a server needs to know without having it: which requests its models can make,
and what a plan would run. The workers send it; the front checks requests against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nexus_rt.engines.experts import boundaries
from nexus_rt.errors import InputError
from nexus_rt.latents import LatentGrid
from nexus_rt.request import GenerationRequest, make_request
from nexus_rt.serve.problems import wrong
from nexus_rt.serve.requests import CALL, ClipRequest
from nexus_rt.size import BuiltSizes, ClipSize

if TYPE_CHECKING:
    from nexus_rt.pipeline import NexusPipeline


@dataclass(frozen=True)
class Profile:
    """A pipeline, told. loras: whether LoRAs can be changed."""

    defaults: Any
    grid: LatentGrid
    generators: tuple[str, ...]
    boundaries: dict[str, float]
    built_sizes: tuple[BuiltSizes, ...]
    understands: bool
    loras: bool
    device: str

    @classmethod
    def of(cls, pipe: NexusPipeline) -> Profile:
        return cls(
            defaults=pipe.defaults,
            grid=pipe.grid,
            generators=tuple(pipe.engines),
            boundaries=dict(boundaries(pipe.engines)),
            built_sizes=pipe.built_sizes,
            understands=pipe.context is not None,
            loras=all(hasattr(e, "model") for e in pipe.engines.values()),
            device=str(pipe.device),
        )

    def plan(self, size: ClipSize, call: dict[str, Any]) -> GenerationRequest:
        """A call of these settings, checked.

        Raises:
            Problem: 400; the models cannot make it.
        """
        given: dict[str, Any] = {n: call.get(n) for n in CALL}
        try:
            self.grid.check(size)
            for built in self.built_sizes:
                built.check(size)
            made = make_request(
                self.defaults,
                height=size.height,
                width=size.width,
                num_frames=size.frames,
                energy=None,
                gamma_w=None,
                blend=None,
                output_type="np",
                num_videos_per_prompt=1,
                published=False,
                **given,
            )
        except InputError as error:
            raise wrong(_field(str(error), given), str(error)) from error
        absent = [g for g in made.plan.generators if g not in self.generators]
        if absent:
            raise wrong(
                "plan",
                f"plan {made.plan.name!r} runs the {absent[0]} generator, which this server has"
                f" not; expected plans of {' and '.join(self.generators)}.",
            )
        return replace(made, plan=made.plan.with_experts(self.boundaries))

    def check(self, request: ClipRequest) -> GenerationRequest:
        """A request, checked against the models.

        Raises:
            Problem: 400 with the field at fault.
        """
        if request.loras and not self.loras:
            raise wrong(
                "lora",
                "this server runs exported engines, whose LoRAs were merged when they were made;"
                " leave lora out.",
            )
        made = self.plan(request.size, request.options)
        if request.rewrite not in (None, "off"):
            if "large" not in made.plan.generators:
                raise wrong(
                    "rewrite",
                    f"rewrite is what the large generator reads, and plan {made.plan.name!r} does"
                    " not run it; leave rewrite out.",
                )
            if request.rewrite == "auto" and not self.understands:
                raise wrong(
                    "rewrite",
                    "rewrite 'auto' asks an understanding model, and this server's pair has none;"
                    " leave it out, or send a text.",
                )
        return made


def _field(message: str, call: dict[str, Any]) -> str | None:
    """The request's name of what an error is about."""
    names = {"height": "size", "width": "size", "size": "size", "unknown solver": "solver"}
    names |= {n: n for n in ("num_frames", *CALL)}
    asked = next((field for start, field in names.items() if message.startswith(start)), None)
    return asked or ("plan" if call["plan"] is not None else None)
