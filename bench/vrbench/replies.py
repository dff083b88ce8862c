"""A judge's reply to answers: what it says, and in which of the ways it says nothing."""

from __future__ import annotations

import json
import re
from typing import Any

from nexus_rt.bench.vrbench.scoring import NO, YES
from nexus_rt.core.chat import Reply
from nexus_rt.core.errors import readable

MAX_TEXT, MAX_OBJECTS = 200_000, 256  # characters read; places tried for a JSON object
Answers = dict[str, dict[str, str]]  # question -> its "answer" and "reason"
START = re.compile(r'\{\s*(?=["}])')
CAUSES = {  # why a question has no answer -> in words
    "length": "the reply was cut at the token limit (finish_reason length)",
    "content_filter": "the server's content filter withheld the reply",
    "reasoning": "the reply is reasoning alone, without content",
    "empty": "the reply is empty",
    "unreadable": "the reply could not be read",
}


def cause_of(reply: Reply) -> str:
    """Why no answer can be read of a reply, as `CAUSES` names it."""
    if reply.finish in ("length", "content_filter"):
        return reply.finish
    return "unreadable" if reply.text.strip() else "reasoning" if reply.reasoning else "empty"


def parse(reply: str, wanted: list[str]) -> Answers:
    """The answers found in a reply: question -> {"answer": "Yes" | "No", "reason"}; what cannot be
    read is left out.

    What a model thought before its last `</think>` is dropped. Of several JSON objects the one with
    most answers counts, of equals the last. Tolerates code fences, text around the JSON, a bare
    "Yes", lower case, and answers without their `answers` object. Bounded in time whatever the
    text.
    """
    text = reply.rpartition("</think>")[2][-MAX_TEXT:]
    decoder, end = json.JSONDecoder(), 0
    best: Answers = {}
    starts = [m.start() for m in START.finditer(text)]
    for place in starts[-MAX_OBJECTS:]:
        if place < end:  # inside an object that was read
            continue
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        candidate = _best(value, wanted)
        if candidate and len(candidate) >= len(best):
            best = candidate
    return best


def _best(value: Any, wanted: list[str], depth: int = 3) -> Answers:
    """The most answers of an object, or of the objects in it."""
    if not isinstance(value, dict):
        return {}
    scores = {q: answer for q in wanted if (answer := _answer(value.get(q))) is not None}
    rows = value.get("answers")
    if isinstance(rows, list):  # a row a question, each naming its own
        named = [(r.get("id") or r.get("question_id"), r) for r in rows if isinstance(r, dict)]
        listed = {q: a for q, r in named if q in wanted and (a := _answer(r)) is not None}
        scores = listed if len(listed) > len(scores) else scores
    if depth:
        for inner in value.values():
            other = _best(inner, wanted, depth - 1)
            scores = other if len(other) > len(scores) else scores
    return scores


def _answer(value: Any) -> dict[str, str] | None:
    row = value if isinstance(value, dict) else {"answer": value}
    word = row.get("answer")
    if isinstance(word, bool):
        word = YES if word else NO
    plain = word.strip().strip(".!\"'").lower() if isinstance(word, str) else ""
    if plain not in ("yes", "no"):
        return None
    reason = row.get("reason")
    return {
        "answer": YES if plain == "yes" else NO,
        "reason": readable(reason).strip() if isinstance(reason, str) else "",
    }
