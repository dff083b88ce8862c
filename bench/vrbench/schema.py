"""VR-Bench's prompt files (Lumos-Nexus, arXiv 2605.31603) as categories, prompts and weighted
questions.

A file is one object keyed by category name -> `category_description`, optional
`evaluation_principle`, `prompts`: `[{id, category, prompt_en, description, difficulty, evaluation:
{overall_instruction, evaluation_description, scoring_method?, evaluation_questions: [{id: "q1",
question, weight, importance_score}]}}]`. The generation-only variant has no `evaluation`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.paths import as_path
from nexus_rt.pipeline.prompts import (
    category_prompts,
    check_ids,
    check_name,
    parse_json,
    prompt_files,
    read_text,
)

LAYERS = 3
MAX_WEIGHT = 1e9  # the sum of many stays a number
Weight = Annotated[float, msgspec.Meta(ge=0, le=MAX_WEIGHT)]


@dataclass(frozen=True)
class Question:
    """One question of a clip. weight: what its Yes counts; importance: the file's
    `importance_score`, kept and not used."""

    id: str
    text: str
    weight: float
    importance: float | None = None

    @property
    def layer(self) -> int:
        """Its layer from 0: questions 1 and 2, 3 to 5, 6 and on."""
        number = int(self.id[1:])
        return 0 if number <= 2 else 1 if number <= 5 else 2


@dataclass(frozen=True)
class Prompt:
    """One clip to make and what to ask of it; `questions` is empty in the generation-only variant.

    category: its code; category_name: as the file has it. role, judge_instructions: the category's
    own words to the judge, of its `judge_role` (or `role`) and `judge_instructions` (or
    `instructions`), for the published protocol.
    """

    id: str
    category: str
    text: str
    difficulty: str = ""
    description: str = ""
    instruction: str = ""
    behaviour: str = ""
    principle: str = ""
    questions: tuple[Question, ...] = ()
    category_name: str = ""
    role: str = ""
    judge_instructions: str = ""


@dataclass(frozen=True)
class Taxonomy:
    """Categories by code: their names, the names of their three layers, and the groups they are
    reported in."""

    names: dict[str, str]
    layers: dict[str, tuple[str, ...]]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def code(self, name: str) -> str:
        """The code of a category named by its code, its name, or both ("Energy Transfer
        Visualization (ETV)"); an unknown name is its own code."""
        plain = re.sub(r"[^a-z]+", " ", re.sub(r"\(.*?\)", "", name).lower()).strip()
        for code, full in self.names.items():
            if name.strip().upper() == code or f"({code})" in name or plain == full.lower():
                return code
        return name.strip()

    def layer_names(self, code: str) -> tuple[str, ...]:
        return self.layers.get(code) or tuple(f"layer {i + 1}" for i in range(LAYERS))


class _Category(msgspec.Struct):
    name: str
    layers: list[str] | None = None


class _Taxonomy(msgspec.Struct):
    """`taxonomy.json`'s form."""

    categories: dict[str, _Category]
    groups: dict[str, list[str]]


class _Question(msgspec.Struct):
    id: str
    question: str
    weight: Weight
    importance_score: Weight | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"q[1-9][0-9]{0,5}", self.id):
            raise InputError(f'id is {shown(self.id)}; expected "q1", "q2", ...', param="id")
        if not self.question.strip():
            raise InputError("question is empty; expected text", code="missing", param="question")


class _Evaluation(msgspec.Struct):
    """A prompt's `evaluation`, but for its texts."""

    evaluation_questions: list[_Question]

    def __post_init__(self) -> None:
        ids = [q.id for q in self.evaluation_questions]
        if not ids:
            raise InputError(
                "evaluation_questions is empty; expected questions",
                code="missing",
                param="evaluation_questions",
            )
        if len(set(ids)) < len(ids):
            twice = max(ids, key=ids.count)
            raise InputError(
                f"question {twice!r} is there twice; expected each once",
                code="duplicate",
                param="id",
            )
        if sum(q.weight for q in self.evaluation_questions) <= 0:
            raise InputError(
                "the weights sum to zero; expected one above zero at least",
                code="out_of_range",
                param="weight",
            )


def read_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Names, layers and groups of categories: a file of your own in `taxonomy.json`'s form, else
    that.

    Raises:
        InputError: it breaks the form.
    """
    path = as_path("path", path) if path else Path(__file__).with_name("taxonomy.json")
    names, layers, groups = {}, {}, {}
    document = parse_json(read_text(path), str(path))
    taxonomy = documents.check(
        document, _Taxonomy, str(path), InputError, "see taxonomy.json's form"
    )
    for code, row in taxonomy.categories.items():
        names[code] = row.name
        layers[code] = tuple(row.layers or ())
        if len(layers[code]) not in (0, LAYERS):
            raise InputError(
                f"{path}: categories.{code}.layers has {len(layers[code])} names; expected"
                f" {LAYERS}.",
                code="mismatch",
                param=f"categories.{code}.layers",
            )
    for group, codes in taxonomy.groups.items():
        if unknown := [c for c in codes if c not in names]:
            raise InputError(
                f"{path}: groups.{group} holds {unknown[0]!r}; expected categories, of"
                f" {', '.join(names)}.",
                code="unknown_name",
                param=f"groups.{group}",
            )
        groups[group] = tuple(codes)
    return Taxonomy(names, layers, groups)


def read_bench(path: str | Path, taxonomy: Taxonomy) -> list[Prompt]:
    """The prompts of a VR-Bench file, or of all the `.json` files of a folder.

    Raises:
        InputError: a file that breaks the schema (with the field's place and what was expected), an
            id that is there twice, weights that sum to zero.
    """
    path = as_path("path", path)
    prompts = [prompt for file in prompt_files(path) for prompt in _file(file, taxonomy)]
    check_ids([p.id for p in prompts], path)
    return prompts


def _file(path: Path, taxonomy: Taxonomy) -> list[Prompt]:
    document = parse_json(read_text(path), str(path))
    if not isinstance(document, dict) or not document:
        kind = "nothing" if document == {} else f"a {type(document).__name__}"
        raise InputError(
            f"{path} holds {kind}; expected an object keyed by category name, as VR-Bench's files"
            " are.",
            code="invalid_type",
        )
    prompts = []
    for name, category in document.items():
        where = f"{path}: {name}"
        rows = category_prompts(category, where)
        principle = _text(category, "evaluation_principle", where)
        role = _text(category, "judge_role", where) or _text(category, "role", where)
        words = _text(category, "judge_instructions", where) or _text(
            category, "instructions", where
        )
        for row, place in rows:
            prompt = _prompt(row, place, taxonomy.code(name), principle)
            prompts.append(
                replace(
                    prompt, category_name=_folder_name(name), role=role, judge_instructions=words
                )
            )
    return prompts


def _folder_name(name: str) -> str:
    """A category's name where it can be a folder's, else nothing."""
    plain = name.strip()
    fits = plain not in (".", "..") and not set("/\\") & set(plain) and len(plain) < 200
    return plain if fits else ""


def _text(row: dict[str, Any], name: str, where: str) -> str:
    """A field that may be absent; an object or a list is kept as JSON text."""
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(
            f"{where}.{name} is {shown(value)}; expected text.", code="invalid_type", param=name
        )
    return str(value).strip()


def _prompt(row: dict[str, Any], where: str, category: str, principle: str) -> Prompt:
    prompt = Prompt(
        check_name(row["id"], where),
        category,
        str(row["prompt_en"]).strip(),
        _text(row, "difficulty", where),
        _text(row, "description", where),
        principle=principle,
    )
    if row.get("evaluation") is None:
        return prompt
    evaluation, place = row["evaluation"], f"{where}.evaluation"
    checked = documents.check(evaluation, _Evaluation, place, InputError, "mend it")
    questions = tuple(
        Question(q.id, q.question.strip(), q.weight, q.importance_score)
        for q in checked.evaluation_questions
    )
    instruction, behaviour = (
        _text(evaluation, name, place) for name in ("overall_instruction", "evaluation_description")
    )
    return replace(prompt, instruction=instruction, behaviour=behaviour, questions=questions)
