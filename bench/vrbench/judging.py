"""Clips and questions to a judge, and its replies to answers: asked once, kept, and never asked
again.

Every clip's answers are a file of their own in `<clips>/judged/`, named by a hash of the clip's
bytes, the questions, the judge and the prompt template, and written when the reply has come: a run
that was stopped goes on, another judge or another template starts anew, and going back to the first
costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from nexus_rt.bench.results import read_as, write_text
from nexus_rt.bench.vrbench.judges import Conversation, Judge, JudgeError
from nexus_rt.bench.vrbench.protocol import AGAIN, STRICT, Protocol
from nexus_rt.bench.vrbench.replies import CAUSES, Answers, cause_of, parse
from nexus_rt.bench.vrbench.schema import Prompt, Taxonomy, Weight
from nexus_rt.bench.vrbench.scoring import UNKNOWN, YES, clip_scores
from nexus_rt.core import documents
from nexus_rt.core.deadline import begin
from nexus_rt.core.errors import InputError, NexusError, readable
from nexus_rt.media.reading import read_frames

SCHEMA, KIND = 1, "nexus-rt vrbench"
FILE = "judgment.json"
# a protocol's own: scores of two are never mixed
FILES = {"strict": FILE, "published": "judgment.published.json"}
GRACE = 1.2  # seconds that replies on their way have when a run is stopped


def key_of(clip: bytes, prompt: Prompt, judge: str, protocol: Protocol) -> str:
    """What a clip's answers are kept under."""
    asked = [
        hashlib.sha256(clip).hexdigest(),
        protocol.render(prompt, protocol.frames),
        AGAIN,
        judge,
        *protocol.settings(),
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def ask(
    judge: Judge,
    prompt: Prompt,
    frames: np.ndarray,
    protocol: Protocol = STRICT,
) -> Answers:
    """All of a clip's questions in one request, and once more where a reply lacks any; what is
    missing then is Unknown, with its cause.

    Raises:
        JudgeError, ChatUnavailable: no reply.
    """
    picked = protocol.pick(frames)
    content = [
        *({"type": "image"} for _ in picked),
        {"type": "text", "text": protocol.render(prompt, len(picked))},
    ]
    talk: Conversation = [{"role": "user", "content": content}]
    wanted = [q.id for q in prompt.questions]
    reply = judge.reply(talk, list(picked))
    scores = parse(reply.text, wanted)
    if len(scores) < len(wanted) and reply.finish != "content_filter":
        first = reply.text or "(no content)"
        talk += [
            {"role": r, "content": [{"type": "text", "text": t}]}
            for r, t in (("assistant", first), ("user", AGAIN))
        ]
        reply = judge.reply(talk, list(picked))
        scores = {**parse(reply.text, wanted), **scores}
    shown, cause = readable(reply.text[:300]).strip() or "nothing", cause_of(reply)
    left_out = {
        "answer": UNKNOWN,
        "reason": f"{CAUSES[cause]}; the judge's last reply: {shown}",
        "cause": cause,
    }
    return {q: scores.get(q, left_out) for q in wanted}


class _Answer(msgspec.Struct):
    answer: Literal["Yes", "No", "Unknown"]
    reason: str
    cause: str = ""

    def row(self) -> dict[str, str]:
        return {
            "answer": self.answer,
            "reason": self.reason,
            **({"cause": self.cause} if self.cause else {}),
        }


class _Asked(_Answer, kw_only=True):
    question: str
    weight: Weight
    layer: Annotated[int, msgspec.Meta(ge=0)]


class _Judged(msgspec.Struct):
    category: str
    difficulty: str
    prompt: str
    file: str
    answers: dict[str, _Asked]


class Judgment(msgspec.Struct):
    """`judgment.json`: what a report reads of it."""

    judge: str
    when: str
    template: str
    protocol: Literal["strict", "published"]
    clips: dict[str, _Judged]
    missing: dict[str, str]
    failed: dict[str, str]


class Unreadable(NexusError):
    """A clip that is no video."""

    code = "unreadable"


@dataclass(frozen=True)
class Clip:
    """A prompt's clip as it was found."""

    prompt: Prompt
    path: Path
    key: str


def clip_path(folder: Path, prompt: Prompt) -> Path | None:
    """`<folder>/<id>.mp4` (or .gif), or under the category's folder, by its code or its name in the
    prompt file."""
    places = [
        folder,
        *(folder / name for name in dict.fromkeys((prompt.category, prompt.category_name)) if name),
    ]
    for place in places:
        for suffix in (".mp4", ".gif"):
            if (path := place / f"{prompt.id}{suffix}").is_file():
                return path
    return None


def find_clips(
    prompts: list[Prompt],
    folder: Path,
    judge: str,
    protocol: Protocol = STRICT,
) -> tuple[list[Clip], dict[str, str]]:
    """The clips of a folder (`clip_path`), and why the others have none."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; expected one that holds a clip for every prompt's id.",
            code="not_found",
        )
    clips, missing = [], {}
    for prompt in prompts:
        path = clip_path(folder, prompt)
        if path is None:
            missing[prompt.id] = f"no {prompt.id}.mp4"
            continue
        try:
            clips.append(Clip(prompt, path, key_of(path.read_bytes(), prompt, judge, protocol)))
        except OSError as error:
            missing[prompt.id] = f"{path.name} cannot be read ({error.strerror})"
    return clips, missing


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


class _Answers(msgspec.Struct):
    """What is kept of a clip under `judged/`."""

    answers: dict[str, _Answer]


def _kept(path: Path, prompt: Prompt) -> Answers | None:
    """Answers asked before; None where there are none, or a damaged file."""
    try:
        kept = documents.read(path, _Answers).answers
        return {q.id: kept[q.id].row() for q in prompt.questions}
    except (NexusError, KeyError):
        return None


def judge_clips(
    prompts: list[Prompt],
    folder: Path,
    judge: Judge,
    taxonomy: Taxonomy,
    requests: int = 4,
    say: Callable[[str], None] = lambda line: None,
    protocol: Protocol = STRICT,
    retry_unknown: bool = False,
) -> dict[str, Any]:
    """Judge every prompt's clip in a folder, and write the protocol's file there.

    Args:
        requests: clips asked about at a time, where the judge takes several.
        retry_unknown: ask again about clips with an answer that could not be read before; what was
            answered stays.

    Returns:
        What the file holds: {"judge", "clips": {id: answers and scores}, "missing": {id: why},
        "failed": {id: why}, ...}.

    Raises:
        InputError: prompts without questions, or answers that cannot be written down.
            ChatUnavailable: nothing can be judged; what was answered is kept.
    """
    if silent := [p.id for p in prompts if not p.questions]:
        raise InputError(
            f"{silent[0]} has no evaluation_questions ({len(silent)} such prompts): the"
            " generation-only variant cannot be judged; pass the files with evaluation.",
            code="missing",
            param="evaluation_questions",
        )
    clips, missing = find_clips(prompts, folder, judge.name, protocol)
    store = folder / "judged"
    try:
        store.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{store} cannot be made ({error.strerror}); judge a folder that you may write to.",
            code="not_writable",
        ) from None
    answers = {
        c.prompt.id: kept
        for c in clips
        if (kept := _kept(store / f"{c.key}.json", c.prompt)) is not None
    }
    unread = {
        n
        for n, kept in answers.items()
        if retry_unknown and any(a["answer"] == UNKNOWN for a in kept.values())
    }
    todo = [c for c in clips if c.prompt.id not in answers or c.prompt.id in unread]
    failed: dict[str, str] = {}
    again = f" ({len(unread)} again, for answers that were Unknown)" if unread else ""
    say(
        f"{len(todo)} clips to judge{again}, {len(answers) - len(unread)} were judged before,"
        f" {len(missing)} are missing"
    )

    def one(clip: Clip) -> Answers:
        try:
            frames = read_frames(clip.path)
        except InputError as error:
            raise Unreadable(str(error)) from error
        before = answers.get(clip.prompt.id, {})
        known = {q: a for q, a in before.items() if a["answer"] != UNKNOWN}
        made = ask(judge, clip.prompt, frames, protocol) | known
        _write(
            store / f"{clip.key}.json",
            {"clip": clip.path.name, "judge": judge.name, "answers": made},
        )
        return made

    done = 0
    for clip, result in _in_threads(one, todo, requests if judge.parallel else 1, judge, say):
        name, done = clip.prompt.id, done + 1
        if isinstance(result, Unreadable):
            missing[name] = str(result)
            say(f"[{done}/{len(todo)}] {name}: {result}")
        elif isinstance(result, JudgeError):
            if name not in answers:
                failed[name] = str(result)
            say(f"[{done}/{len(todo)}] {name}: FAILED: {result}")
        elif isinstance(result, BaseException):
            raise result
        else:
            answers[name] = result
            yes = sum(a["answer"] == YES for a in result.values())
            say(f"[{done}/{len(todo)}] {name}: {yes} of {len(result)} Yes")
    outcome = {
        "schema": SCHEMA,
        "kind": KIND,
        "judge": judge.name,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "protocol": protocol.name,
        "template": protocol.template,
        "clips": {
            c.prompt.id: _row(c, answers[c.prompt.id], taxonomy, folder, protocol)
            for c in clips
            if c.prompt.id in answers
        },
        "missing": missing,
        "failed": failed,
    }
    _write(folder / FILES[protocol.name], outcome)
    return outcome


def _in_threads(
    work: Callable[[Clip], Answers],
    todo: list[Clip],
    count: int,
    judge: Judge,
    say: Callable[[str], None],
) -> Iterator[tuple[Clip, Answers | BaseException]]:
    """Each clip with what `work` returned or raised, as it ends; in threads that a stopped process
    does not wait for. A clip begins when the result before it was taken.

    A run that is stopped gives replies on their way a moment, then leaves them.
    """
    waiting, on_way = iter(todo), dict[Future[Answers], Clip]()
    try:
        while True:
            for clip in islice(waiting, count - len(on_way)):
                on_way[begin(partial(work, clip))] = clip
            if not on_way:
                return
            # an interrupt is seen between waits, whatever the system
            for future in wait(on_way, 0.1, FIRST_COMPLETED).done:
                yield on_way.pop(future), future.exception() or future.result()
    finally:
        if left := [future for future in on_way if not future.done()]:
            say(
                f"stopping; {len(left)} replies are on their way, and those that come within"
                f" {GRACE:g} s are kept"
            )
            wait(left, GRACE)
            judge.stop()


def _row(
    clip: Clip,
    answers: Answers,
    taxonomy: Taxonomy,
    folder: Path,
    protocol: Protocol,
) -> dict[str, Any]:
    prompt = clip.prompt
    rows: dict[str, dict[str, Any]] = {
        q.id: {**answers[q.id], "question": q.text, "weight": q.weight, "layer": q.layer}
        for q in prompt.questions
    }
    return {
        "category": prompt.category,
        "difficulty": prompt.difficulty,
        "prompt": prompt.text,
        "file": clip.path.relative_to(folder).as_posix(),
        "key": clip.key,
        "answers": rows,
        **clip_scores(rows, taxonomy.layer_names(prompt.category), protocol.counts_unanswered),
    }


def judgments(path: Path) -> list[Path]:
    """The judgment files of a folder, strict first; a file is itself."""
    if not path.is_dir():
        return [path]
    return [path / name for name in FILES.values() if (path / name).is_file()] or [path / FILE]


def read_judgment(path: Path) -> dict[str, Any]:
    """A folder's `judgment.json`, or such a file; errors as `read_as`."""
    path = path / FILE if path.is_dir() else path
    maker = f"`nexus-rt vrbench judge PROMPTS {path.parent}`"
    remedy = "judge the clips again: what was answered is kept"
    judgment = read_as(path, KIND, SCHEMA, maker, remedy)
    judgment.setdefault("protocol", "strict")
    documents.check(judgment, Judgment, str(path), remedy=remedy)
    return judgment
