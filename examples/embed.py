"""A pipeline in a product: one worker thread, a queue of requests, progress, cancelling, errors.

    python examples/embed.py "a striped red circle moves left on a black background" clip.mp4

Calls of one pipeline wait for each other, so one thread owns it; a web server hands its requests to
the queue and reads progress from the `Job`. Start worker processes with 'spawn', never by a fork.
"""

from __future__ import annotations

import queue
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nexus_rt import Cancelled, NexusError, NexusPipeline, save_video


@dataclass
class Job:
    """One request and what became of it."""

    prompt: str
    file: Path
    seed: int = 0
    steps: int = 10
    done: threading.Event = field(default_factory=threading.Event)
    progress: float = 0.0
    error: str | None = None
    cancelled: bool = False


class Worker:
    """A thread that owns a pipeline."""

    def __init__(self, pipe: NexusPipeline) -> None:
        self.pipe = pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.jobs: queue.Queue[Job | None] = queue.Queue()
        self.running: Job | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> Job:
        """Queue a request; wait for `job.done`."""
        self.jobs.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Stop a request before its next step, or before it begins."""
        job.cancelled = True
        if self.running is job:
            self.pipe.cancel()

    def close(self) -> None:
        """Finish what is queued, and end the thread."""
        self.jobs.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            self.running = job
            try:
                if not job.cancelled:
                    self._generate(job)
            except Cancelled:
                job.cancelled = True
            except NexusError as error:  # one sentence what, one what to do: fit for a user's eyes
                job.error = str(error)
            finally:
                self.running = None
                job.done.set()

    def _generate(self, job: Job) -> None:
        def on_step(pipe: NexusPipeline, index: int, timestep: int, tensors: dict) -> None:
            job.progress = (index + 1) / job.steps
            if job.cancelled:
                pipe.cancel()

        result = self.pipe(
            job.prompt,
            num_inference_steps=job.steps,
            generator=torch.Generator().manual_seed(job.seed),
            callback_on_step_end=on_step,
        )
        save_video(result.frames[0], job.file)


def main(prompt: str, file: str) -> None:
    """Make one clip as a server would."""
    worker = Worker(NexusPipeline.from_pretrained())
    job = worker.submit(Job(prompt, Path(file)))
    while not job.done.wait(0.2):
        print(f"{job.progress:.0%}")
    worker.close()
    print(job.error or job.file)


if __name__ == "__main__":
    main(*sys.argv[1:])
