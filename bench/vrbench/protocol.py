"""How a clip is put to a judge and its answers are counted: as published, or strictly.

`published` (Lumos-Nexus, arXiv 2605.31603): the category's own role and instructions where the
prompt files have them, the description of what was meant, the benefit of the doubt, frames at
truncated uniform places; a question without an answer stays in the denominator. `strict` leaves a
question without an answer out of both sums, and counts it beside the score.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from nexus_rt.bench.vrbench.schema import Prompt
from nexus_rt.core.errors import InputError, choose
from nexus_rt.media.frames import uniform

PROTOCOLS = ("strict", "published")
FRAMES, TOKENS = 16, 1024
TEMPLATE = """You judge a video that a model generated, from {count} of its frames, sampled uniformly in time and in order.

The video was to show: {prompt}
{about}
Answer every question with "Yes" or "No" from what the frames show. A behaviour that is only partly visible counts as Yes. \
Weights say how much a question counts.

{questions}

Reply with this JSON and nothing else, one entry a question:
{{"video_id": "{id}", "answers": {{{shape}}}}}"""
PUBLISHED = """{role}You are shown {count} frames of a generated video, in order.

The video was generated from this prompt: {prompt}
{about}
{instructions}Give the benefit of the doubt: answer "Yes" where the frames show what is asked, even in part or roughly. \
Answer "No" only where it is clearly absent.

{questions}

Reply with this JSON and nothing else, one entry a question:
{{"video_id": "{id}", "answers": {{{shape}}}}}"""
AGAIN = (
    "That could not be read as the JSON asked for with an answer to every question. Reply with the"
    " JSON alone."
)


@dataclass(frozen=True)
class Protocol:
    """How clips are judged. name: one of `PROTOCOLS`; frames: of a clip that the judge sees;
    picture_size: longest side in pixels, None for as large as keeps a request below 4 MB;
        max_tokens, temperature: of its reply.
    """

    name: str = "strict"
    frames: int = FRAMES
    picture_size: int | None = None
    max_tokens: int | None = None  # TOKENS
    temperature: float = 0.0

    def __post_init__(self) -> None:
        choose("protocol", self.name, PROTOCOLS)
        for name, value, high in (
            ("frames", self.frames, 1024),
            ("picture-size", self.picture_size, 4096),
            ("max-tokens", self.max_tokens, 1_000_000),
        ):
            if value is not None and not 1 <= value <= high:
                raise InputError(
                    f"--{name} is {value}; expected 1 to {high}.",
                    code="out_of_range",
                    param=name.replace("-", "_"),
                )
        if not 0 <= self.temperature <= 2:
            raise InputError(
                f"--temperature is {self.temperature}; expected 0 to 2.",
                code="out_of_range",
                param="temperature",
            )

    @property
    def counts_unanswered(self) -> bool:
        """Whether a question without an answer stays in a score's denominator."""
        return self.name == "published"

    @property
    def template(self) -> str:
        """A hash of the texts a judge is sent."""
        own = PUBLISHED if self.name == "published" else TEMPLATE
        return hashlib.sha256((own + AGAIN).encode()).hexdigest()[:16]

    def pick(self, frames: np.ndarray) -> np.ndarray:
        """The frames a judge sees, uniformly from first to last; as published their places are cut,
        not rounded."""
        if self.name != "published":
            return uniform(frames, self.frames)
        return frames[np.linspace(0, len(frames) - 1, min(self.frames, len(frames))).astype(int)]

    def settings(self) -> list:
        """What besides the texts makes answers its own; empty for the plain strict one."""
        own = [self.name, self.frames, self.picture_size, self.max_tokens, self.temperature]
        return [] if own == ["strict", FRAMES, None, None, 0.0] else own

    def render(self, prompt: Prompt, count: int) -> str:
        """The text of a clip's request."""
        published = self.name == "published"
        about = [
            f"{name}: {text}"
            for name, text in (
                ("Description", prompt.description if published else ""),
                ("Instruction", prompt.instruction),
                ("What matters", prompt.behaviour),
                ("Principle", prompt.principle),
            )
            if text
        ]
        shape = ", ".join(
            f'"{q.id}": {{"answer": "Yes" or "No", "reason": "one sentence"}}'
            for q in prompt.questions
        )
        asked = "\n".join(f"{q.id} (weight {q.weight:g}): {q.text}" for q in prompt.questions)
        text = dict(
            count=count,
            prompt=prompt.text,
            about="\n".join(about) + "\n" * bool(about),
            questions=asked,
            id=prompt.id,
            shape=shape,
        )
        if not published:
            return TEMPLATE.format(**text)
        lines = {"role": prompt.role, "instructions": prompt.judge_instructions}
        return PUBLISHED.format(**text, **{k: f"{v}\n\n" if v else "" for k, v in lines.items()})


STRICT = Protocol()
