"""A call's settings are written down once: what follows from a field, in every front."""

import importlib.util
import inspect
import json
import math
from typing import Annotated

import pytest

from nexus_rt import BlendConfig, InputError, NexusPipeline, cli
from nexus_rt.cli import main
from nexus_rt.cli.pipeline import call_settings
from nexus_rt.core.errors import UnknownArgument
from nexus_rt.core.fields import CLI, GENERATE, REWRITING, described, fields_of
from nexus_rt.media.reading import read_metadata
from nexus_rt.pipeline import settings
from nexus_rt.pipeline.request import make_request
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests.refusals import refuses

FIELDS = [(CallSettings, field) for field in fields_of(CallSettings).values()]
FIELDS += [(BlendConfig, field) for field in fields_of(BlendConfig).values()]
PROMPT = "a red circle moves left"


class Flickering(CallSettings, frozen=True, kw_only=True):
    """A setting that does not exist."""

    flicker: Annotated[
        float | None, described("share of frames that flicker, 10% at most", 0.0, 0.1)
    ] = None


def of_kinds(*kinds):
    """Parameters: the structs and fields of some kinds."""
    return [
        pytest.param(kind, field, id=f"{kind.__name__}.{field.name}")
        for kind, field in FIELDS
        if field.kind in kinds
    ]


def options_of(command):
    """A command's option strings."""
    known = cli.parser()._subparsers._group_actions[0].choices[command]
    return {option for action in known._actions for option in action.option_strings}


def made(kind, name, value):
    """A struct with one value; its partner, which bounds it, lies at the end of the range."""
    ends = {"sigma_min": "sigma_max", "rho_min": "rho_max"}
    partners = {**ends, **{high: low for low, high in ends.items()}}
    if kind is BlendConfig and name in partners:
        partner = fields_of(kind)[partners[name]]
        return kind(**{name: value, partner.name: partner.high if name in ends else partner.low})
    return kind(**{name: value})


# One field, every front


@pytest.mark.parametrize("command", ["generate", "batch", "plan", "vrbench generate"])
def test_a_new_field_is_an_option_with_help(command, monkeypatch, capsys):
    monkeypatch.setattr(settings, "CallSettings", Flickering)
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "--flicker FLICKER share of frames that flicker, 10% at most, 0 to 0.1" in words


def test_a_new_field_is_in_the_json_schema(monkeypatch):
    assert "flicker" not in settings.json_schema()["properties"]
    monkeypatch.setattr(settings, "CallSettings", Flickering)
    assert settings.json_schema()["properties"]["flicker"] == {
        "description": "share of frames that flicker, 10% at most",
        "anyOf": [{"type": "number", "minimum": 0.0, "maximum": 0.1}, {"type": "null"}],
    }


def test_a_new_field_reaches_the_call_and_the_clip_s_metadata(tiny_pair, tmp_path, monkeypatch):
    """The pipeline's call names its keywords; here it gets the one more that uses the field."""
    used, call = [], NexusPipeline.__call__

    def flickers(self, *args, flicker=None, **keywords):
        used.append(flicker)
        return call(self, *args, **keywords)

    monkeypatch.setattr(settings, "CallSettings", Flickering)
    monkeypatch.setattr(NexusPipeline, "__call__", flickers)
    line = ["generate", PROMPT, "--pair", str(tiny_pair), "--quiet", "--guidance", "0", "-o"]
    assert main([*line, str(tmp_path / "a.mp4"), "--flicker", "0.05"]) == 0
    assert main([*line, str(tmp_path / "b.mp4")]) == 0
    assert used == [0.05, None]
    assert read_metadata(tmp_path / "a.mp4")["options"] == {"guidance_scale": 0.0, "flicker": 0.05}
    assert read_metadata(tmp_path / "b.mp4")["options"] == {"guidance_scale": 0.0}
    assert main([*line, str(tmp_path / "c.mp4"), "--flicker", "0.2"]) == 2
    assert not (tmp_path / "c.mp4").exists()


def test_a_new_field_is_in_the_metadata_of_a_batch(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "CallSettings", Flickering)
    (tmp_path / "list.txt").write_text(PROMPT)
    line = ["batch", str(tmp_path / "list.txt"), "--pair", str(tiny_pair), "-o", str(tmp_path)]
    assert main([*line, "--flicker", "0.05"]) == 0
    assert read_metadata(tmp_path / "0000.mp4")["options"] == {"flicker": 0.05}
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert row["settings"]["options"] == {"flicker": "0.05"}


# The pipeline's call


def call_parameters():
    return dict(list(inspect.signature(NexusPipeline.__call__).parameters.items())[1:])


def test_the_call_s_keywords_are_the_settings_in_their_order_with_their_defaults():
    keywords = {n: p.default for n, p in call_parameters().items() if n in settings.fields()}
    defaults = zip(CallSettings.__struct_fields__, CallSettings.__struct_defaults__, strict=True)
    assert list(keywords.items()) == list(defaults)


def test_the_call_has_diffusers_order():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    from diffusers import WanPipeline

    theirs = [n for n in inspect.signature(WanPipeline.__call__).parameters if n != "self"]
    positional = [
        n for n, p in call_parameters().items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == [n for n in theirs if n not in ("return_dict", "attention_kwargs")]
    shared = [n for n in CallSettings.__struct_fields__ if n in theirs]
    assert shared == [n for n in theirs if n in settings.fields()] and len(shared) >= 8


# What a field says of itself


@pytest.mark.parametrize("kind, field", [pytest.param(k, f, id=f.name) for k, f in FIELDS])
def test_every_field_has_a_sentence(kind, field):
    assert len(field.sentence) > 12 and not field.sentence.endswith(".")
    assert field.help.startswith(field.sentence) and field.flag.isidentifier()
    assert field.schema["description"].startswith(field.sentence)


def test_every_field_is_described_and_every_flag_its_own():
    assert list(settings.fields()) == list(CallSettings.__struct_fields__)
    assert list(fields_of(BlendConfig)) == list(BlendConfig.__struct_fields__)
    flags = [f.flag for _, f in FIELDS]
    assert len(set(flags)) == len(flags)


# Ranges and types


@pytest.mark.parametrize("kind, field", of_kinds(int))
def test_whole_numbers_are_held_to_their_range(kind, field):
    low, high = int(field.low), int(field.high)
    for value in (low, high):
        assert getattr(made(kind, field.name, value), field.name) == value
    for value in (low - 1, high + 1, -(10**30), 10**30):
        with refuses("out_of_range", field.name, InputError):
            made(kind, field.name, value)
    for value in (float(low), 1.5, math.nan, "1", True, [1], b"1"):
        with refuses("invalid_type", field.name, InputError):
            made(kind, field.name, value)


@pytest.mark.parametrize("kind, field", of_kinds(float, "scale"))
def test_numbers_are_held_to_their_range(kind, field):
    for value in (field.low, field.high):
        assert getattr(made(kind, field.name, value), field.name) == value
    below, above = math.nextafter(field.low, -math.inf), math.nextafter(field.high, math.inf)
    for value in (below, above, math.nan, math.inf, -math.inf, 10**400):
        with refuses("out_of_range", field.name, InputError):
            made(kind, field.name, value)
    for value in ("1", True, {}, b"1"):
        with refuses("invalid_type", field.name, InputError):
            made(kind, field.name, value)


@pytest.mark.parametrize("kind, field", of_kinds("scale"))
def test_two_scales_are_held_to_the_range_each(kind, field):
    value = getattr(kind(**{field.name: [field.low, field.high]}), field.name)
    assert value == (field.low, field.high)
    for pair, code in (
        ((1.0, math.nextafter(field.high, math.inf)), "out_of_range"),
        ((math.nan, 1.0), "out_of_range"),
        ((1.0, "2"), "invalid_type"),
        ((1.0,), "invalid_value"),
        ((1.0, 2.0, 3.0), "invalid_value"),
    ):
        with refuses(code, field.name, InputError):
            kind(**{field.name: pair})


@pytest.mark.parametrize("kind, field", of_kinds(bool))
def test_switches_are_true_or_false(kind, field):
    for value in (True, False):
        assert getattr(kind(**{field.name: value}), field.name) is value
    for value in (0, 1, "yes", math.nan, None):
        with refuses("invalid_type", field.name, InputError):
            kind(**{field.name: value})


@pytest.mark.parametrize("kind, field", of_kinds(str))
def test_names_are_those_of_the_field(kind, field):
    for name in field.choices:
        assert getattr(kind(**{field.name: name}), field.name) == name
    for value in (field.choices[0].upper(), "", 3, math.nan, [field.choices[0]]):
        with refuses("unknown_name", field.name, InputError):
            kind(**{field.name: value})


@pytest.mark.parametrize("kind, field", of_kinds("numbers"))
def test_lists_are_of_numbers(kind, field):
    assert getattr(kind(**{field.name: [1000, 500.0]}), field.name) == (1000.0, 500.0)
    for value in ([], "1000", ["1000"], [1000, math.nan], [True], 7, math.nan, {"a": 1}):
        with refuses("invalid_value", field.name, InputError):
            kind(**{field.name: value})
    for value in ([math.nextafter(1000, 2000), 500], [500, math.nextafter(1e-3, 0)], [500, 500]):
        with refuses("invalid_value", field.name, InputError):
            make_request(kind(**{field.name: value, "solver": "euler"}), Defaults())


@pytest.mark.parametrize("value", [7, math.nan, True, ["large"]])
def test_a_plan_is_text_or_a_plan(value):
    with refuses("invalid_type", "plan", InputError):
        make_request(CallSettings(plan=value), Defaults())


@pytest.mark.parametrize(
    "value, code, param",
    [
        ({"order": 0}, "out_of_range", "order"),
        ({"sigma": 1}, "unknown_name", "blend"),
        ({"sigma_min": 0.9, "sigma_max": 0.5}, "out_of_range", "sigma_min"),
        ("dct", "invalid_type", "blend"),
        (math.nan, "invalid_type", "blend"),
    ],
)
def test_a_blend_is_a_struct_or_a_mapping(value, code, param):
    assert CallSettings(blend={"split": "dct"}).blend == BlendConfig(split="dct")
    with refuses(code, param, InputError):
        CallSettings(blend=value)


def test_unknown_names_are_refused():
    with refuses("unknown_argument", "steps", UnknownArgument):
        CallSettings.named("make_plan", {"steps": 3})


# The JSON schema


def fits(value, schema):
    """Whether a JSON value fits a schema, by the words that the settings' schema uses."""
    known = {"$schema", "title", "description", "default", "anyOf", "enum", "type"}
    known |= {"minimum", "maximum", "items", "minItems", "maxItems"}
    assert schema.keys() <= known | {"properties", "additionalProperties"}
    types = {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if "type" in schema and not types[schema["type"]]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if types["number"]:
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if types["array"] and "items" in schema:
        inside = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return inside and all(fits(item, schema["items"]) for item in value)
    if types["object"] and "properties" in schema:
        assert schema["additionalProperties"] is False
        every = schema["properties"]
        return all(name in every and fits(v, every[name]) for name, v in value.items())
    return True


def samples(field):
    """JSON values in and outside a field's range, of right types and of wrong ones."""
    yield from (None, True, False, "", "x", {}, {"x": 1}, [], ["x"], [1, 2, 3], -1e300, 1e300)
    yield from field.choices
    if field.low is not None:
        low, high = field.low, field.high
        step = 1 if field.kind is int else high / 1e9
        every = [low, high, low - step, high + step, (low + high) // 2]
        yield from every
        yield from ([value, low] for value in every)
    if field.kind == "numbers":
        yield from ([1000, 500], [1e-3], [1, "2"], [True], [None])
    if field.nested:
        for inner in fields_of(field.kind).values():
            if inner.name not in ("sigma_min", "sigma_max", "rho_min", "rho_max"):  # each a bound
                yield from ({inner.name: value} for value in samples(inner))


def accepts(name, value):
    """Whether a call takes a value."""
    try:
        CallSettings.named("a call", {name: value})
    except InputError:
        return False
    return True


@pytest.mark.parametrize(
    "field", [f for f in settings.fields().values() if f.kind != "any"], ids=lambda f: f.name
)
def test_the_schema_accepts_what_a_call_accepts(field):
    schema = settings.json_schema()
    installed = importlib.util.find_spec("jsonschema")
    if installed:
        from jsonschema import Draft202012Validator

        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema)
    taken = 0
    for value in samples(field):
        document = json.loads(json.dumps({field.name: value}))
        right = accepts(field.name, document[field.name])
        taken += right
        assert fits(document, schema) is right, value
        # JSON schema counts 3.0 as a whole number
        if installed and not (isinstance(value, float) and value.is_integer()):
            assert validator.is_valid(document) is right, value
    assert taken


@pytest.mark.parametrize("name", ["plan", "rewrite"])
def test_the_schema_of_texts(name):
    schema = settings.json_schema()
    for value, right in (("large", True), (None, True), (3, False), (["large"], False)):
        assert fits({name: value}, schema) is right


def test_the_schema_has_the_calls_defaults_and_no_pairs_nor_other_names():
    """A client that fills in a schema's defaults changes nothing."""
    schema = settings.json_schema()
    stated = {n: p["default"] for n, p in schema["properties"].items() if "default" in p}
    assert stated and all(getattr(CallSettings(), n) == v for n, v in stated.items())
    assert "num_frames" not in stated
    assert not fits({"steps": 3}, schema) and fits({}, schema)
    server = settings.json_schema("server")["properties"]
    assert "rewrite" in server and "reuse_parity" not in server


# The command line


def test_each_command_has_the_options_of_its_fronts():
    names = lambda front: {
        "--" + inner.flag.replace("_", "-")
        for f in settings.fields(front).values()
        for inner in (fields_of(f.kind).values() if f.nested else [f])
    }
    common, rewriting, single = names(CLI), names(REWRITING), names(GENERATE)
    assert {"--steps", "--guidance-2", "--gamma-hf", "--split"} <= common
    assert rewriting == {"--rewrite", "--rewrite-timeout"} and single == {"--reuse-parity"}
    assert common | rewriting | single | {"--size"} <= options_of("generate")
    assert common | rewriting | {"--size"} <= options_of("batch")
    assert common | {"--size"} <= options_of("plan")
    assert not options_of("batch") & single and not options_of("plan") & (rewriting | single)
    assert {"--size", "--frames"} <= options_of("tune")


def test_options_become_settings():
    line = (
        "generate x --size 64x48 --frames 5 --steps 4 --guidance 5,4 --guidance-2 3 --shift 2"
        " --plan reference --split dct --order 3 --lowpass butterworth --energy none --gamma-w 0.5"
        " --solver euler --rewrite off --rewrite-timeout 2 --reuse-parity"
    )
    call = call_settings(cli.parser().parse_args(line.split()))
    assert call == CallSettings(
        width=64,
        height=48,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=(5.0, 4.0),
        guidance_scale_2=3.0,
        shift=2.0,
        plan="reference",
        blend=BlendConfig(split="dct", order=3, lowpass="butterworth"),
        energy="none",
        gamma_w=0.5,
        solver="euler",
        rewrite="off",
        rewrite_timeout=2.0,
        reuse_parity=True,
    )
    line = "plan --timesteps 1000,500 --small-steps 3 --large-steps 4 --as-published"
    call = call_settings(cli.parser().parse_args(line.split()))
    assert call == CallSettings(
        timesteps=(1000.0, 500.0), small_steps=3, large_steps=4, as_published=True
    )
    for line in ("generate x", "plan", "tune -o d", "serve", "batch l.txt -o d"):
        assert call_settings(cli.parser().parse_args(line.split())).given == {}


@pytest.mark.parametrize(
    "line, rewrite",
    [
        ("generate x", "auto"),
        ("generate x --rewrite off", "off"),
        ("serve", "auto"),
        ("plan", None),
    ],
)
def test_a_plan_of_a_front_brings_its_rewriting(line, rewrite, tmp_path):
    row = dict(plan="large", ms=900.0, score=0.5, low=0.4, high=0.6, rewrite="auto")
    path = tmp_path / "front.json"
    path.write_text(json.dumps({"front": [row], "tried": 1, "judge": "pixels"}))
    args = cli.parser().parse_args([*line.split(), "--plan", f"@{path}:1000"])
    assert call_settings(args) == CallSettings(plan="large", rewrite=rewrite)


def test_settings_that_are_a_call_s_defaults_are_not_given():
    call = CallSettings(shift=5.0, reuse_parity=False, num_videos_per_prompt=1, blend=BlendConfig())
    assert call.given == {"shift": 5.0, "blend": BlendConfig()}
    assert call.replace(shift=None).given == {"blend": BlendConfig()}
    with refuses("out_of_range", "shift", InputError):
        call.replace(shift=0.0)


@pytest.mark.parametrize(
    "values, code, param",
    [
        (dict(plan=3), "invalid_type", "plan"),
        (dict(energy="none"), "unknown_name", "energy"),
        (dict(as_published=True), "unknown_name", "as_published"),
        (dict(num_videos_per_prompt=3), "unknown_name", "num_videos_per_prompt"),
        (dict(timesteps=(900.0, 500.0)), "unknown_name", "timesteps"),
        (dict(small_shift="x"), "invalid_type", "small_shift"),
        (dict(large_shift=-1.0), "out_of_range", "large_shift"),
        (dict(large_solver="x"), "unknown_name", "large_solver"),
        (dict(small_timesteps="x"), "invalid_value", "small_timesteps"),
    ],
)
def test_a_pair_sets_only_what_calls_read(values, code, param):
    with refuses(code, param):
        Defaults(**values)
