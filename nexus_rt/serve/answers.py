"""What the server answers: a job as OpenAI's `Video`, lists, plans with their prices."""

from __future__ import annotations

from typing import Any

from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.serve.job import Job
from nexus_rt.serve.prices import STAGES, Prices, step_forwards, step_kinds


def video(job: Job, progress: int) -> dict[str, Any]:
    """A job in the fields of OpenAI's `Video`, all of them."""
    failed = job.status == "failed"
    error = {"code": job.error_code, "message": job.error_message} if failed else None
    whole = lambda moment: None if moment is None else int(moment)
    return {
        "id": job.id,
        "object": "video",
        "model": job.request["model"],
        "status": job.status,
        "progress": progress,
        "created_at": int(job.created_at),
        "completed_at": whole(job.completed_at) if job.status == "completed" else None,
        "expires_at": whole(job.expires_at) if job.status == "completed" else None,
        "prompt": job.request["prompt"],
        "remixed_from_video_id": job.remixed_from,
        "seconds": job.request["seconds"],
        "size": f"{job.request['width']}x{job.request['height']}",
        "error": error,
    }


def video_list(rows: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A page of `GET /v1/videos`, of what `video` makes."""
    return {
        "object": "list",
        "data": rows,
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
        "has_more": more,
    }


def model(name: str, created: float) -> dict[str, Any]:
    """A row of `GET /v1/models`."""
    return {"id": name, "object": "model", "created": int(created), "owned_by": "nexus-rt"}


def plan(planned: GenerationRequest, prices: Prices) -> dict[str, Any]:
    """A plan step by step, with what the cost model knows of its price (milliseconds, or null)."""
    cells = planned.size.cells
    rows = []
    steps, kinds, forwards = planned.plan.steps, step_kinds(planned), step_forwards(planned)
    for step, kind, counts, ms in zip(steps, kinds, forwards, prices.steps(planned), strict=True):
        rows.append(
            {
                "step": step.index + 1,
                "timestep": step.timestep,
                "phase": step.alone or "bridge",
                "runs": step.runs,
                "small_weight": round(step.w, 4),
                "kind": kind,
                "forwards": counts,
                "ms": _rounded(ms),
            }
        )
    return {
        "object": "plan",
        "plan": planned.plan.name,
        "size": f"{planned.size.width}x{planned.size.height}",
        "num_frames": planned.size.frames,
        "steps": rows,
        **{f"{name}_ms": _rounded(prices.ms(name, cells)) for name in STAGES},
        "total_ms": _rounded(prices.total(planned), 1),
    }


def _rounded(ms: float | None, digits: int = 2) -> float | None:
    return None if ms is None else round(ms, digits)
