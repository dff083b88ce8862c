"""What a clip is worth: a score from 0 to 1 for each prompt, whatever judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import InputError
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.settings import CallSettings


class ClipJudge(Protocol):
    """Scores clips of one list of prompts.

    name: what it is, written beside every figure. prompts: their texts, in order.
    """

    name: str
    prompts: Sequence[str]

    def scores(self, places: Sequence[int], latents: Tensor, frames: np.ndarray) -> list[float]:
        """Of the prompts at `places`: latents [B, C, T, H, W], frames [B, F, H, W, 3] in 0..1."""
        ...


def noise(places: Sequence[int], seed: int) -> list[torch.Generator]:
    """Each prompt's own noise, the same for every plan."""
    return [torch.Generator().manual_seed(1_000_003 * seed + place) for place in places]


class PixelJudge:
    """The mini pair's riddles: right where shape, colour and motion are, times the nearness of the
    clip's radial spectrum to that of the true rendering passed through the pair's VAE.

    Args:
        seed: of the riddles; those of another seed are disjoint from them.
    """

    name = "pixels"

    def __init__(self, pipe: NexusPipeline, count: int, seed: int) -> None:
        from nexus_rt.bench.shapes import riddles

        if not isinstance(pipe.vae, VideoDecoder):
            raise InputError(
                "the judge pixels encodes true renderings, and this pair has no VAE of weights;"
                " pass another pair or another judge.",
                code="unsupported",
                param="judge",
            )
        self.pipe, self.vae = pipe, pipe.vae
        self.riddles = riddles.make_prompts("riddles", seed, count)
        self.prompts = [r.text for r in self.riddles]
        self.seed, self.true = seed, dict[int, np.ndarray]()

    def _spectrum(self, place: int) -> np.ndarray:
        """Of the true rendering through the VAE, log10."""
        from nexus_rt.bench.shapes import spectrum, world

        if place not in self.true:
            size = self.pipe.request(CallSettings()).size
            rng = np.random.default_rng([self.seed, place, 3])
            drawn = world.render(self.riddles[place].scene, rng, size.frames, size.height)
            video = torch.from_numpy(drawn).float().transpose(0, 1)[None]
            clip = self.pipe.decode(self.vae.encode(video))[0]
            self.true[place] = spectrum.spectrum(clip[::4])
        return self.true[place]

    def scores(self, places: Sequence[int], latents: Tensor, frames: np.ndarray) -> list[float]:
        from nexus_rt.bench.shapes import checker, spectrum

        out = []
        for place, clip in zip(places, frames, strict=True):
            right = all(checker.look(clip).matches(self.riddles[place].scene))
            far = float(np.abs(spectrum.spectrum(clip[::4]) - self._spectrum(place)).mean())
            out.append(right * max(0.0, 1 - far))
        return out


class LatentJudge:
    """Nearness to the latents of a plan that the user holds for the best: 1 / (1 + relative L2
    error)."""

    def __init__(
        self, pipe: NexusPipeline, prompts: Sequence[str], best: str, seed: int, **options: Any
    ) -> None:
        self.name, self.pipe, self.prompts = f"latents of {best}", pipe, list(prompts)
        self.best, self.seed, self.options = best, seed, options
        self.wanted: dict[int, Tensor] = {}

    def best_latents(self, place: int) -> Tensor:
        """The best plan's latents [C, T, H, W] of a prompt."""
        if place not in self.wanted:
            self.wanted[place] = self.pipe(
                self.prompts[place],
                plan=self.best,
                generator=noise([place], self.seed),
                output_type="latent",
                **self.options,
            ).frames[0]
        return self.wanted[place]

    def scores(self, places: Sequence[int], latents: Tensor, frames: np.ndarray) -> list[float]:
        wanted = torch.stack([self.best_latents(p) for p in places])
        error = (latents - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        return (1 / (1 + error)).tolist()


class StatisticsJudge(LatentJudge):
    """Finish and motion like those of the best plan's clips, wherever things are in the frame: one
    less the mean difference of the log10 radial spectra, times the ratio of the mean changes from
    frame to frame (VBench's temporal flickering)."""

    def __init__(
        self, pipe: NexusPipeline, prompts: Sequence[str], best: str, seed: int, **options: Any
    ) -> None:
        super().__init__(pipe, prompts, best, seed, **options)
        self.name = f"statistics of {best}"
        self.known: dict[int, tuple[np.ndarray, float]] = {}

    def scores(self, places: Sequence[int], latents: Tensor, frames: np.ndarray) -> list[float]:
        out = []
        for place, clip in zip(places, frames, strict=True):
            if place not in self.known:
                self.known[place] = _statistics(self.pipe.decode(self.best_latents(place)[None])[0])
            (spectrum, change), (wanted, usual) = _statistics(clip), self.known[place]
            finish = max(0.0, 1 - float(np.abs(spectrum - wanted).mean()))
            ends = sorted((change + 1e-4, usual + 1e-4))
            out.append(finish * ends[0] / ends[1])
        return out


def _statistics(frames: np.ndarray) -> tuple[np.ndarray, float]:
    """Log10 radial spectrum of a clip's frames, and their mean change from one to the next."""
    from nexus_rt.bench.shapes.spectrum import spectrum

    change = float(np.abs(np.diff(frames, axis=0)).mean()) if len(frames) > 1 else 0.0
    return spectrum(frames[::4]), change


class VlmJudge:
    """A vision language model's answers to VR-Bench's kind of question, the weighted share of yes;
    see `nexus_rt.bench.vrbench`.

    Args:
        judge: an endpoint or a model in this process. prompts: with their questions.
    """

    def __init__(self, judge: Any, prompts: Sequence[Any]) -> None:
        if lost := next((p.id for p in prompts if not p.questions), None):
            raise InputError(
                f"prompt {lost} has no questions; expected VR-Bench's files.",
                code="missing",
                param="questions",
            )
        self.name, self.judge, self.items = f"VLM {judge.name}", judge, list(prompts)
        self.prompts = [p.text for p in prompts]

    def scores(self, places: Sequence[int], latents: Tensor, frames: np.ndarray) -> list[float]:
        from nexus_rt.bench.vrbench.judging import ask

        out = []
        for place, clip in zip(places, frames, strict=True):
            item = self.items[place]
            answers = ask(self.judge, item, (255 * clip).round().astype(np.uint8))
            total = sum(q.weight for q in item.questions)
            right = sum(q.weight for q in item.questions if answers[q.id]["answer"] == "Yes")
            out.append(right / total if total else 0.0)
        return out
