"""What of a pipeline a server needs to know without having it: which requests its models can make,
and what a plan would run. The workers send it; the front checks requests against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nexus_rt.core.errors import InputError
from nexus_rt.core.limits import GENERATORS, MAX_STEPS
from nexus_rt.pipeline.request import GenerationRequest, PairProfile, check_request, make_request
from nexus_rt.serve.problems import wrong
from nexus_rt.serve.requests import SENT_AS, ClipRequest, check_steps

if TYPE_CHECKING:
    from nexus_rt.pipeline.pipeline import NexusPipeline


@dataclass(frozen=True)
class Profile(PairProfile):
    """A pipeline without its models. loras: whether LoRAs can be changed."""

    loras: bool = False
    device: str = "cpu"

    @classmethod
    def of(cls, pipe: NexusPipeline) -> Profile:
        return cls(
            **vars(pipe.components.profile),
            loras=all(hasattr(e, "model") for e in pipe.engines.values()),
            device=str(pipe.device),
        )

    def check(self, request: ClipRequest, max_steps: int = MAX_STEPS) -> GenerationRequest:
        """What a request generates, checked against the models. It is made once a job: the
        dispatcher keeps it, and the worker gets it.

        Raises:
            Problem: 400 with the field at fault.
        """
        call = request.settings
        if request.loras and not self.loras:
            raise wrong(
                "lora",
                "this server runs exported engines, whose LoRAs were merged when they were made;"
                " leave lora out.",
            )
        try:
            made = make_request(call, self.defaults, self.boundaries)
        except InputError as error:
            raise wrong(_param(error, request), str(error)) from error
        name = made.plan.name
        check_steps("plan", len(made.plan), max_steps)
        try:
            check_request(made, self)
        except InputError as error:
            absent = " and ".join(g for g in GENERATORS if g not in self.generators)
            words = {  # what a client can do
                "plan": f"plan {name!r} runs the {absent} generator, which this server has not;"
                f" expected plans of {' and '.join(self.generators)}.",
                "rewrite": f"rewrite is what the large generator reads, and plan {name!r} does not"
                " run it; leave rewrite out.",
            }
            raise wrong(_param(error, request), words.get(error.param or "", str(error))) from error
        if call.rewrite == "auto" and not self.understands:
            raise wrong(
                "rewrite",
                "rewrite 'auto' asks an understanding model, and this server's pair has none;"
                " leave it out, or send a text.",
            )
        return made


def _param(error: InputError, request: ClipRequest) -> str | None:
    """The field that an error is about: the setting that it names where the request has it, else
    the plan, whose text may have options of the same names."""
    name = SENT_AS.get(error.param or "", error.param)
    if name == "size" or name in request.call:
        return name
    return name if request.settings.plan is None else "plan"
