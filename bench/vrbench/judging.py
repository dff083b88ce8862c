"""Clips and questions to a judge, and its replies to answers: asked once, kept, and never asked again.

Every clip's answers are a file of their own in `<clips>/judged/`, named by a hash of the clip's bytes, the questions, the
judge and the prompt template, and written when the reply has come: a run that was stopped goes on, another judge or another
template starts anew, and going back to the first costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from nexus_rt.bench.results import read_as, write_text
from nexus_rt.bench.vrbench.judges import Conversation, Judge, JudgeError
from nexus_rt.bench.vrbench.schema import Prompt, Taxonomy
from nexus_rt.bench.vrbench.scoring import NO, UNKNOWN, YES, clip_scores
from nexus_rt.errors import InputError, NexusError
from nexus_rt.video import read_frames, uniform

SCHEMA, KIND, FRAMES = 1, "nexus-rt vrbench", 16
FILE = "judgment.json"
TEMPLATE = """You judge a video that a model generated, from {count} of its frames, sampled uniformly in time and in order.

The video was to show: {prompt}
{about}
Answer every question with "Yes" or "No" from what the frames show. A behaviour that is only partly visible counts as Yes. \
Weights say how much a question counts.

{questions}

Reply with this JSON and nothing else, one entry a question:
{{"video_id": "{id}", "answers": {{{shape}}}}}"""
AGAIN = "That could not be read as the JSON asked for with an answer to every question. Reply with the JSON alone."


def render(prompt: Prompt, count: int) -> str:
    """The text of a clip's request."""
    about = [
        f"{name}: {text}" for name, text in (
            ("Instruction", prompt.instruction), ("What matters", prompt.behaviour), ("Principle", prompt.principle),
        ) if text
    ]  # fmt: skip
    shape = ", ".join(f'"{q.id}": {{"answer": "Yes" or "No", "reason": "one sentence"}}' for q in prompt.questions)
    asked = "\n".join(f"{q.id} (weight {q.weight:g}): {q.text}" for q in prompt.questions)
    return TEMPLATE.format(
        count=count, prompt=prompt.text, about="\n".join(about) + "\n" * bool(about), questions=asked, id=prompt.id, shape=shape
    )


def parse(reply: str, wanted: list[str]) -> dict[str, dict[str, str]]:
    """The answers found in a reply: question -> {"answer": "Yes" | "No", "reason"}; what cannot be read is left out.

    Tolerates code fences, text around the JSON, a bare "Yes", lower case, and answers without their `answers` object.
    """
    decoder, place = json.JSONDecoder(), reply.find("{")
    while place >= 0:
        try:
            said, end = decoder.raw_decode(reply, place)
        except (ValueError, RecursionError):
            place = reply.find("{", place + 1)
            continue
        rows = said.get("answers", said)
        found = {q: answer for q in wanted if isinstance(rows, dict) and (answer := _answer(rows.get(q))) is not None}
        if found:
            return found
        place = reply.find("{", end)
    return {}


def _answer(said: Any) -> dict[str, str] | None:
    row = said if isinstance(said, dict) else {"answer": said}
    word = row.get("answer")
    if isinstance(word, bool):
        word = YES if word else NO
    plain = word.strip().strip(".!\"'").lower() if isinstance(word, str) else ""
    if plain not in ("yes", "no"):
        return None
    reason = row.get("reason")
    return {"answer": YES if plain == "yes" else NO, "reason": reason.strip() if isinstance(reason, str) else ""}


def key_of(clip: bytes, prompt: Prompt, judge: str) -> str:
    """What a clip's answers are kept under."""
    text = json.dumps([hashlib.sha256(clip).hexdigest(), render(prompt, FRAMES), AGAIN, judge])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def ask(judge: Judge, prompt: Prompt, frames: np.ndarray) -> dict[str, dict[str, str]]:
    """All of a clip's questions in one request, and once more where a reply lacks any; what is missing then is Unknown.

    Raises:
        JudgeError, JudgeUnusable: no reply.
    """
    picked = uniform(frames, FRAMES)
    content = [*({"type": "image"} for _ in picked), {"type": "text", "text": render(prompt, len(picked))}]
    talk: Conversation = [{"role": "user", "content": content}]
    wanted = [q.id for q in prompt.questions]
    reply = judge.reply(talk, picked)
    found = parse(reply, wanted)
    if len(found) < len(wanted):
        talk += [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("assistant", reply), ("user", AGAIN))]
        again = judge.reply(talk, picked)
        found = {**parse(again, wanted), **found}
        reply = again
    left_out = {"answer": UNKNOWN, "reason": f"the judge's last reply: {reply[:300].strip() or 'nothing'}"}
    return {q: found.get(q, left_out) for q in wanted}


class Unreadable(NexusError):
    """A clip that is no video."""


@dataclass(frozen=True)
class Clip:
    """A prompt's clip as it was found."""

    prompt: Prompt
    path: Path
    key: str


def find_clips(prompts: list[Prompt], folder: Path, judge: str) -> tuple[list[Clip], dict[str, str]]:
    """The clips of `<folder>/<id>.mp4` (or .gif), and why the others have none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one that holds a clip for every prompt's id.")
    found, missing = [], {}
    for prompt in prompts:
        path = next((p for s in (".mp4", ".gif") if (p := folder / f"{prompt.id}{s}").is_file()), None)
        if path is None:
            missing[prompt.id] = f"no {prompt.id}.mp4"
            continue
        try:
            found.append(Clip(prompt, path, key_of(path.read_bytes(), prompt, judge)))
        except OSError as error:
            missing[prompt.id] = f"{path.name} cannot be read ({error.strerror})"
    return found, missing


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _kept(path: Path, prompt: Prompt) -> dict[str, dict[str, str]] | None:
    """Answers asked before; None where there are none, or a damaged file."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["answers"]
        return {q.id: {"answer": said[q.id]["answer"], "reason": said[q.id]["reason"]} for q in prompt.questions}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def judge_clips(
    prompts: list[Prompt], folder: Path, judge: Judge, taxonomy: Taxonomy, requests: int = 4,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Judge every prompt's clip in a folder, and write `judgment.json` there.

    Args:
        requests: clips asked about at a time, where the judge takes several.

    Returns:
        What the file holds: {"judge", "clips": {id: answers and scores}, "missing": {id: why}, "failed": {id: why}, ...}.

    Raises:
        InputError: prompts without questions, or answers that cannot be written down. JudgeUnusable: nothing can be judged;
            what was answered is kept.
    """
    if silent := [p.id for p in prompts if not p.questions]:
        raise InputError(
            f"{silent[0]} has no evaluation_questions ({len(silent)} such prompts): the generation-only variant cannot be "
            "judged; pass the files with evaluation."
        )
    clips, missing = find_clips(prompts, folder, judge.name)
    store = folder / "judged"
    store.mkdir(exist_ok=True)
    answers = {c.prompt.id: kept for c in clips if (kept := _kept(store / f"{c.key}.json", c.prompt)) is not None}
    todo, failed = [c for c in clips if c.prompt.id not in answers], {}
    say(f"{len(todo)} clips to judge, {len(answers)} were judged before, {len(missing)} are missing")

    def one(clip: Clip) -> dict[str, dict[str, str]]:
        try:
            frames = read_frames(clip.path)
        except InputError as error:
            raise Unreadable(str(error)) from error
        said = ask(judge, clip.prompt, frames)
        _write(store / f"{clip.key}.json", {"clip": clip.path.name, "judge": judge.name, "answers": said})
        return said

    at_once = requests if judge.parallel else 1
    pool = ThreadPoolExecutor(at_once)
    running: dict[Future, Clip] = {}
    try:
        waiting = iter(todo)
        done = 0
        while True:
            while len(running) < 2 * at_once and (clip := next(waiting, None)) is not None:
                running[pool.submit(one, clip)] = clip
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, done = running.pop(future).prompt.id, done + 1
                try:
                    answers[name] = future.result()
                    yes = sum(a["answer"] == YES for a in answers[name].values())
                    say(f"[{done}/{len(todo)}] {name}: {yes} of {len(answers[name])} Yes")
                except JudgeError as error:
                    failed[name] = str(error)
                    say(f"[{done}/{len(todo)}] {name}: FAILED: {error}")
                except Unreadable as error:
                    missing[name] = str(error)
                    say(f"[{done}/{len(todo)}] {name}: {error}")
    except BaseException:
        judge.stop()
        if begun := sum(f.running() for f in running):
            say(f"stopping; {begun} replies are on their way, and are kept")
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # what is on its way is paid for: it is kept
    found = {
        "schema": SCHEMA, "kind": KIND, "judge": judge.name, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "template": hashlib.sha256((TEMPLATE + AGAIN).encode()).hexdigest()[:16],
        "clips": {c.prompt.id: _row(c, answers[c.prompt.id], taxonomy) for c in clips if c.prompt.id in answers},
        "missing": missing, "failed": failed,
    }  # fmt: skip
    _write(folder / FILE, found)
    return found


def _row(clip: Clip, said: dict[str, dict[str, str]], taxonomy: Taxonomy) -> dict[str, Any]:
    prompt = clip.prompt
    answers = {q.id: {**said[q.id], "question": q.text, "weight": q.weight, "layer": q.layer} for q in prompt.questions}
    return {
        "category": prompt.category, "difficulty": prompt.difficulty, "prompt": prompt.text, "file": clip.path.name,
        "key": clip.key, "answers": answers, **clip_scores(answers, taxonomy.layer_names(prompt.category)),
    }  # fmt: skip


def read_judgment(path: Path) -> dict[str, Any]:
    """A folder's `judgment.json`, or such a file; errors as `read_as`."""
    path = path / FILE if path.is_dir() else path
    maker = f"`nexus-rt vrbench judge PROMPTS {path.parent}`"
    return read_as(path, KIND, SCHEMA, maker, "judge the clips again: what was answered is kept")
