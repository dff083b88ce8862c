"""Settings by their annotations: what a struct's field says of itself, and the checks, help texts
and JSON schemas that follow from it.

A field is `Annotated[type, described("what it is", low=..., high=...)]`. msgspec holds the structs;
their values are checked here, so that an error names the setting and what was expected.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from nexus_rt.core.checks import instance, number, switch, whole
from nexus_rt.core.errors import InputError, choose, shown
from nexus_rt.core.limits import MAX_STEPS

# Where a field can be set, besides Python: options of every command that takes a plan, of those
# that rewrite prompts, of `generate` alone; prompt lists; requests of the server.
CLI, REWRITING, GENERATE = "cli", "rewriting", "generate"
LIST, SERVER = "list", "server"
FRONTS = (CLI, LIST, SERVER)


def described(
    sentence: str,
    low: float | None = None,
    high: float | None = None,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    unit: str = "",
    default: Any = None,
    pair: bool = False,
    fronts: tuple[str, ...] = FRONTS,
) -> Meta:
    """What a field's annotation says of it.

    Args:
        sentence: what the setting is.
        low, high: of its numbers, both included.
        flag: its option on the command line, and its name in prompt lists; by default the field's.
        metavar: the option's value in the help.
        unit: of its numbers.
        default: Wan's value, where None means "the pair's own".
        pair: a pair may set it.
        fronts: where it can be set, besides Python.
    """
    # Not Meta's own ge and le: msgspec 0.22 reads freed memory for them inside of unions.
    extra: dict[str, Any] = {"low": low, "high": high, "unit": unit}
    extra |= {"flag": flag, "metavar": metavar}
    extra |= {"default": default, "pair": pair, "fronts": fronts}
    return Meta(description=sentence, extra=extra)


@dataclass(frozen=True)
class Field:
    """A setting as its fronts use it.

    kind: int, float, bool, str, "scale" (a number, or two), "numbers" and "texts" (lists), "any",
        or a struct.
    low, high: of its numbers. choices: of its names. optional: None is a value. default: of the
    struct, or Wan's where that is None. flag: its name on the command line and in prompt lists.
    pair: a pair may set it. nested: it is a struct of settings.
    """

    name: str
    kind: Any
    sentence: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    default: Any = None
    unit: str = ""
    flag: str = ""
    metavar: str | None = None
    fronts: tuple[str, ...] = FRONTS
    pair: bool = False
    nested: bool = False

    def checked(self, value: Any) -> Any:
        """The value as a call keeps it.

        Raises:
            InputError: of another type, or outside the range; names the setting.
        """
        if self.kind is bool:
            return switch(self.name, value)
        if self.choices:
            return choose(self.name, value, self.choices)
        if self.nested:
            return self._struct(value)
        if self.kind == "numbers":
            return self._numbers(value)
        if self.kind == "any":
            return value
        assert self.low is not None and self.high is not None
        if self.kind is int:
            return whole(self.name, value, int(self.low), int(self.high))
        if self.kind == "scale" and isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise InputError(
                    f"{self.name} has {len(value)} numbers; expected one, or two: of the expert for"
                    " high noise and of the one for low.",
                    param=self.name,
                )
            return tuple(number(self.name, one, self.low, self.high) for one in value)
        return number(self.name, value, self.low, self.high)

    def _struct(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return instance(self.name, value, self.kind, f"a {self.kind.__name__}")
        for name in value:
            if name not in self.kind.__struct_fields__:
                raise InputError(
                    f"{self.name} sets an unknown {shown(name)}; expected some of"
                    f" {', '.join(self.kind.__struct_fields__)}.",
                    code="unknown_name",
                    param=self.name,
                )
        return self.kind(**value)

    def _numbers(self, value: Any) -> tuple[float, ...]:
        try:
            items = islice(value, MAX_STEPS + 1)
            numbers = [number(self.name, item, -math.inf, math.inf) for item in items]
        except Exception:  # no list, or what its items raise
            numbers = []
        if not numbers or isinstance(value, (str, bytes)):
            raise InputError(
                f"{self.name} are {shown(value)}; expected a descending list of numbers, such as"
                " [1000, 750, 500, 250].",
                param=self.name,
            )
        return tuple(numbers)

    @property
    def schema(self) -> dict[str, Any]:
        """The setting as a property of a JSON schema."""
        bounds = {"minimum": self.low, "maximum": self.high}
        one = {"type": "number", **{k: v for k, v in bounds.items() if v is not None}}
        forms: dict[Any, list[dict[str, Any]]] = {
            bool: [{"type": "boolean"}],
            int: [{**one, "type": "integer"}],
            float: [one],
            str: [{"enum": list(self.choices)} if self.choices else {"type": "string"}],
            "texts": [{"type": "array", "items": {"type": "string"}}],
            "any": [{"type": "string"}],
            "scale": [one, {"type": "array", "items": one, "minItems": 2, "maxItems": 2}],
            "numbers": [{"type": "array", "items": {"type": "number"}, "minItems": 1}],
        }
        kinds = [object_schema(fields_of(self.kind).values())] if self.nested else forms[self.kind]
        kinds = [*kinds, {"type": "null"}] if self.optional else kinds
        form = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        words = self.sentence + (f" ({self.unit})" if self.unit else "")
        # of a setting that a pair may have, null is the pair's own and no client may fill it in
        stated = {} if self.default is None or self.pair else {"default": self.default}
        return {"description": words, **form, **stated}

    @property
    def help(self) -> str:
        """One line for the command line: what it is, its unit, range and default."""
        words = self.sentence
        if self.choices and not all(c in words for c in self.choices):
            words += f": {' | '.join(self.choices)}"
        bounds = self.low is not None and self.kind in (int, float)
        words += f", in {self.unit}" if self.unit else ""
        words += f", {self.low:.12g} to {self.high:.12g}" if bounds else ""
        if self.pair and self.default is not None:
            words += f" (default: the pair's; Wan's: {self.default})"
        elif not (self.optional or self.kind in (bool, "texts") or "(default" in self.sentence):
            words += f" (default: {self.default})"
        return words


def object_schema(known: Iterable[Field]) -> dict[str, Any]:
    """A JSON schema's object of these fields and no others."""
    properties = {field.name: field.schema for field in known}
    return {"type": "object", "properties": properties, "additionalProperties": False}


@lru_cache(maxsize=16)
def fields_of(kind: type[Any]) -> dict[str, Field]:
    """The described fields of a struct or a dataclass by name, in its order."""
    hints = get_type_hints(kind, include_extras=True)
    if is_dataclass(kind):
        defaults = {f.name: f.default for f in fields(kind)}
    else:
        defaults = dict(zip(kind.__struct_fields__, kind.__struct_defaults__, strict=True))
    return {
        name: _field(name, hints[name], default)
        for name, default in defaults.items()
        if get_origin(hints[name]) is Annotated
    }


def _field(name: str, hint: Any, default: Any) -> Field:
    """A setting from its annotation and its default."""
    inner, meta = get_args(hint)
    choices: tuple[str, ...] = ()
    kinds: list[Any] = []
    for one in get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (inner,):
        if get_origin(one) is Literal:
            choices, kinds = get_args(one), [*kinds, str]
        elif get_origin(one) is tuple:
            first, *rest = get_args(one)
            many = "texts" if first is str else "numbers"
            kinds.append(many if Ellipsis in rest else "scale")
        else:
            kinds.append("any" if one is Any else one)
    optional = type(None) in kinds or "any" in kinds
    kinds = [k for k in kinds if k is not type(None)]
    extra = dict(meta.extra)
    wan, flag = extra.pop("default"), extra.pop("flag") or name
    kind = "scale" if "scale" in kinds else kinds[0]
    return Field(
        name,
        kind,
        meta.description or "",
        choices=choices,
        optional=optional,
        default=wan if optional else default,
        flag=flag,
        nested=isinstance(kind, type) and issubclass(kind, msgspec.Struct),
        **extra,
    )
