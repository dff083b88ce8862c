"""Clips and questions to a judge, and its replies to answers: asked once, kept, and never asked
again.

Every clip's answers are a file of their own in `<clips>/judged/`, named by a hash of the clip's
bytes, the questions, the judge and the prompt template, and written when the reply has come: a run
that was stopped goes on, another judge or another template starts anew, and going back to the first
costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from nexus_rt.bench.results import read_as, write_text
from nexus_rt.bench.vrbench.http_judge import Conversation, JudgeError
from nexus_rt.bench.vrbench.judges import Judge
from nexus_rt.bench.vrbench.protocol import AGAIN, FRAMES, Protocol
from nexus_rt.bench.vrbench.replies import CAUSES, Reply, parse
from nexus_rt.bench.vrbench.schema import MAX_WEIGHT, Prompt, Taxonomy
from nexus_rt.bench.vrbench.scoring import NO, UNKNOWN, YES, clip_scores
from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.media.video import read_frames

__all__ = ["FILE", "FILES", "FRAMES", "ask", "judge_clips", "parse", "read_judgment", "render"]
SCHEMA, KIND = 1, "nexus-rt vrbench"
FILE = "judgment.json"
# a protocol's own: scores of two are never mixed
FILES = {
    "strict": FILE,
    "published": "judgment.published.json",
}
GRACE = 1.2  # seconds that replies on their way have when a run is stopped


def render(prompt: Prompt, count: int, protocol: Protocol = Protocol()) -> str:  # noqa: B008 (frozen)
    """The text of a clip's request."""
    return protocol.render(prompt, count)


def key_of(clip: bytes, prompt: Prompt, judge: str, protocol: Protocol = Protocol()) -> str:  # noqa: B008 (frozen)
    """What a clip's answers are kept under."""
    asked = [
        hashlib.sha256(clip).hexdigest(),
        render(prompt, protocol.frames, protocol),
        AGAIN,
        judge,
        *protocol.settings(),
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def ask(
    judge: Judge,
    prompt: Prompt,
    frames: np.ndarray,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
) -> dict[str, dict[str, str]]:
    """All of a clip's questions in one request, and once more where a reply lacks any; what is
    missing then is Unknown, with its cause.

    Raises:
        JudgeError, JudgeUnusable: no reply.
    """
    picked = protocol.pick(frames)
    content = [
        *({"type": "image"} for _ in picked),
        {"type": "text", "text": render(prompt, len(picked), protocol)},
    ]
    talk: Conversation = [{"role": "user", "content": content}]
    wanted = [q.id for q in prompt.questions]
    reply = _reply(judge, talk, picked)
    scores = parse(reply.text, wanted)
    if len(scores) < len(wanted) and reply.finish != "content_filter":
        first = reply.text or "(no content)"
        talk += [
            {"role": r, "content": [{"type": "text", "text": t}]}
            for r, t in (("assistant", first), ("user", AGAIN))
        ]
        reply = _reply(judge, talk, picked)
        scores = {**parse(reply.text, wanted), **scores}
    shown = reply.text[:300].strip() or "nothing"
    left_out = {
        "answer": UNKNOWN,
        "reason": f"{CAUSES[reply.cause]}; the judge's last reply: {shown}",
        "cause": reply.cause,
    }
    return {q: scores.get(q, left_out) for q in wanted}


def _reply(judge: Judge, talk: Conversation, frames: np.ndarray) -> Reply:
    reply = judge.reply(talk, frames)
    return reply if isinstance(reply, Reply) else Reply(str(reply))


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
    weight: Annotated[float, msgspec.Meta(ge=0, le=MAX_WEIGHT)]
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
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
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


def _kept(path: Path, prompt: Prompt) -> dict[str, dict[str, str]] | None:
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
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
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
            JudgeUnusable: nothing can be judged; what was answered is kept.
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

    def one(clip: Clip) -> dict[str, dict[str, str]]:
        try:
            frames = read_frames(clip.path)
        except InputError as error:
            raise Unreadable(str(error)) from error
        answers = ask(judge, clip.prompt, frames, protocol)
        before = answers.get(clip.prompt.id, {})
        answers = {
            q: before[q] if before.get(q, {}).get("answer") in (YES, NO) else a
            for q, a in answers.items()
        }
        _write(
            store / f"{clip.key}.json",
            {"clip": clip.path.name, "judge": judge.name, "answers": answers},
        )
        return answers

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
    work: Callable[[Clip], Any],
    todo: list[Clip],
    count: int,
    judge: Judge,
    say: Callable[[str], None],
) -> Iterator[tuple[Clip, Any]]:
    """Each clip with what `work` returned or raised, as it ends; in threads that a stopped process
    does not wait for.

    A run that is stopped gives replies on their way a moment, then leaves them.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    ended: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()
    begun: set[str] = set()
    for clip in todo:
        waiting.put(clip)

    def serve() -> None:
        while not stopped.is_set():
            try:
                clip = waiting.get_nowait()
            except queue.Empty:
                return
            begun.add(clip.prompt.id)
            try:
                result = work(clip)
            except BaseException as error:
                result = error
                if not isinstance(error, (JudgeError, Unreadable)):
                    stopped.set()  # nothing can be judged: the others need not begin
            begun.discard(clip.prompt.id)
            ended.put((clip, result))

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(count, len(todo)))]
    for thread in threads:
        thread.start()
    try:
        for _ in todo:
            while True:
                with contextlib.suppress(queue.Empty):
                    yield ended.get(timeout=0.1)
                    break
                if not any(t.is_alive() for t in threads) and ended.empty():
                    return
    finally:
        stopped.set()
        until = time.monotonic() + GRACE
        if on_way := len(begun):
            say(
                f"stopping; {on_way} replies are on their way, and those that come within {GRACE:g}"
                " s are kept"
            )
            while begun and time.monotonic() < until:
                time.sleep(0.02)
        judge.stop()


def _row(
    clip: Clip,
    answers: dict[str, dict[str, str]],
    taxonomy: Taxonomy,
    folder: Path,
    protocol: Protocol,
) -> dict[str, Any]:
    prompt = clip.prompt
    answers = {
        q.id: {**answers[q.id], "question": q.text, "weight": q.weight, "layer": q.layer}
        for q in prompt.questions
    }
    return {
        "category": prompt.category,
        "difficulty": prompt.difficulty,
        "prompt": prompt.text,
        "file": clip.path.relative_to(folder).as_posix(),
        "key": clip.key,
        "answers": answers,
        **clip_scores(answers, taxonomy.layer_names(prompt.category), protocol.counts_unanswered),
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
