"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nexus_rt.serve.generate import memory

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """What `/metrics` shows. counts: jobs by state, asked when it is scraped."""

    def __init__(self, counts: Callable[[], Mapping[str, int]], used: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._counts, self._used = counts, used

        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)

        def histogram(name: str, words: str, *labels: str) -> Histogram:
            return Histogram(name, words, labels, buckets=SECONDS, registry=registry)

        self.jobs = gauge("nexus_rt_jobs", "Jobs in the store", ["status"])
        self.stored = gauge("nexus_rt_stored_bytes", "Bytes of all results")
        self.streams = gauge("nexus_rt_event_streams", "Open event streams")
        self.ready = gauge("nexus_rt_ready", "1 where jobs are run")
        self.submitted = counter("nexus_rt_jobs_submitted", "Jobs accepted")
        self.refused = counter("nexus_rt_jobs_refused", "Jobs refused, by code", ["code"])
        self.ended = counter(
            "nexus_rt_jobs_ended",
            "Jobs that ended, by kind: completed, or a failure's code",
            ["kind"],
        )
        self.lost = counter("nexus_rt_workers_lost", "Workers that went down in a job")
        self.hung = counter("nexus_rt_workers_hung", "Workers that were ended as they hung")
        self.wait = histogram("nexus_rt_queue_wait_seconds", "From creation to the first step")
        self.job = histogram("nexus_rt_job_seconds", "From beginning to end of a job's work")
        self.step = histogram("nexus_rt_step_seconds", "One denoising step", "kind")
        self.stage = histogram(
            "nexus_rt_stage_seconds", "Encoding, denoising, decoding, writing", "stage"
        )
        self.moves = counter("nexus_rt_residency_moves", "Phases for which engines were moved")
        self.memory = gauge(
            "nexus_rt_memory_bytes",
            "Memory of the server and, after its last job, of the worker",
            ["process", "kind"],
        )
        self.http = histogram("nexus_rt_http_seconds", "Requests, streams aside", "route", "status")

    def finished(self, perf: Mapping[str, Any], kinds: Mapping[int, str]) -> None:
        """A completed job; kinds: what ran in each step."""
        self.job.observe(perf["total_duration_ms"] / 1000)
        for row in perf["steps"]:
            self.stage.labels(row["name"]).observe(row["duration_ms"] / 1000)
        for row in perf["denoise_steps_ms"]:
            self.step.labels(kinds.get(row["step"], "")).observe(row["duration_ms"] / 1000)
        self.moves.inc(perf["meta"]["residency_moves"])
        for values in perf["memory_checkpoints"].values():
            for name, megabytes in values.items():
                kind = name.removesuffix("_mb")
                self.memory.labels("worker", kind).set(megabytes * 2**20)

    def text(self) -> bytes:
        """The exposition format; what changes by itself is asked now."""
        import torch

        for status, count in self._counts().items():
            self.jobs.labels(status).set(count)
        self.stored.set(self._used())
        for name, megabytes in memory(torch.device("cpu")).items():
            self.memory.labels("server", name.removesuffix("_mb")).set(megabytes * 2**20)
        return generate_latest(self.registry)
