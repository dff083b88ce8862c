"""A job while a runner has it: its steps, its progress, and what its watchers read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.serve.generate import Event
from nexus_rt.serve.job import Job
from nexus_rt.serve.watchdog import Call

INTERNAL = ("waiting", "begun", "phase")  # events of a runner that are not a watcher's


@dataclass
class RunningJob:
    """A running job.

    left: milliseconds that the cost model gives it after 0, 1, ... steps; None where it has no
        price. done: its steps; progress: percent. call: the runner's that it is in.
    """

    job: Job
    planned: GenerationRequest
    left: list[float] | None
    call: Call
    done: int = 0
    progress: int = 0

    @property
    def ms_left(self) -> float | None:
        return None if self.left is None else round(self.left[self.done], 1)

    def reach(self, step: int) -> None:
        """So many steps are done."""
        steps = len(self.planned.plan)
        self.done = min(step, steps)
        share = self.done / steps
        if self.left is not None and self.left[0]:
            share = 1 - self.left[self.done] / self.left[0]
        self.progress = max(self.progress, min(99, int(100 * share)))

    def state(self) -> dict[str, Any]:
        """Where it is: step, phase, percent, milliseconds left by the cost model."""
        steps = self.planned.plan.steps
        at = steps[max(0, self.done - 1)]
        return {
            "step": self.done,
            "steps": len(steps),
            "phase": at.alone or "bridge",
            "runs": at.runs,
            "progress": self.progress,
            "ms_left": self.ms_left,
        }

    def heard(self, event: Event) -> dict[str, Any] | None:
        """An event of the job's worker, as its watchers read it; None where it is not theirs."""
        self.call.heard(event)
        if event["kind"] in INTERNAL:
            return None
        details = {k: v for k, v in event.items() if k not in ("kind", "fresh")}
        if event["kind"] == "step":
            self.reach(event["step"])
            details |= self.state()
        return details
