"""Every argument of the public interface with values that are none of its own: the error is a
`NexusError`, whatever the value."""

import numpy as np
import pytest
import torch

import nexus_rt
from nexus_rt import BlendConfig, NexusPipeline, parse_plan, save_video, time_grid
from nexus_rt.core.size import ClipSize
from nexus_rt.method.generator import Prompt
from nexus_rt.method.plan import Plan, StepCosts
from nexus_rt.method.step import Step
from nexus_rt.method.time_grid import TimeGrid
from nexus_rt.method.upfb import blend, gate
from nexus_rt.pipeline.settings import CallSettings
from tests.bad_values import parameters, raw_errors

PROMPT = "a red circle"


@pytest.fixture
def pipe(tiny_pipe):
    own = dict(vars(tiny_pipe))
    yield tiny_pipe
    vars(tiny_pipe).update(own)


def test_a_call(pipe):
    base = {"prompt": PROMPT, "num_inference_steps": 1, "output_type": "latent"}
    names = [n for n in parameters(NexusPipeline.__call__) if n != "self"]
    assert len(names) > 30
    # these are called, and what they raise is the caller's
    called = {("callback_on_step_end", words) for words in ("a broken object", "a class")}
    assert raw_errors(pipe, base, names, called) == {}


def test_loading(tiny_pair):
    base = {"pretrained": tiny_pair, "local_files_only": True}
    names = parameters(NexusPipeline.from_pretrained)
    assert len(names) > 20
    assert raw_errors(NexusPipeline.from_pretrained, base, names) == {}


METHODS = {
    "make_plan": {},
    "plan_residency": {"plan": "", "size": ClipSize(48, 32, 5)},
    "call_parts": {"size": ClipSize(48, 32, 5)},
    "encode_prompt": {"prompt": PROMPT},
    "encode": {"prompt": PROMPT},
    "request": {"settings": CallSettings()},
    "rewrite": {"prompt": PROMPT},
    "prepare_latents": {"batch": 1, "size": ClipSize(48, 32, 5)},
    "check_size": {"size": ClipSize(48, 32, 5), "output_type": "np"},
    "decode": {"latents": torch.zeros(1, 16, 1, 4, 6)},
    "set_loras": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(pipe, name):
    method = getattr(pipe, name)
    base = dict(METHODS[name])
    if "plan" in base:
        base["plan"] = pipe.make_plan()
    assert raw_errors(method, base, parameters(method)) == {}


def test_contexts(mini_pipe):
    pipe = mini_pipe
    text, no_text = pipe.encode_prompt(PROMPT)
    base = {"prompt": PROMPT, "prompt_embeds": text, "negative_prompt_embeds": no_text}
    method = pipe.encode_context
    assert raw_errors(method, base, parameters(method)) == {}


def test_attributes_that_are_set(pipe):
    names = [n for n in dir(pipe) if not n.startswith("__")]
    own = dict(vars(pipe))

    def assign(name, value):
        try:
            setattr(pipe, name, value)
        finally:
            vars(pipe).clear()
            vars(pipe).update(own)

    raw = {}
    for name in [*names, "scheduler", "transformer", "anything"]:
        found = raw_errors(lambda value=None, name=name: assign(name, value), None, ["value"])
        raw |= {(name, words): error for (_, words), error in found.items()}
    assert raw == {}


def test_the_progress_bar(pipe):
    options = ["disable", "desc", "total", "ncols", "file", "unit", "mininterval", "no_option"]
    assert raw_errors(pipe.set_progress_bar_config, {}, options) == {}


GRID = time_grid(4, 5.0)
VELOCITY = torch.zeros(1, 16, 2, 4, 6)
FUNCTIONS = {
    "parse_plan": (parse_plan, {"spec": "small", "grid": GRID}),
    "time_grid": (time_grid, {"steps": 4}),
    "gate": (gate, {"timestep": 500.0}),
    "blend": (blend, {"v_small": VELOCITY, "v_large": VELOCITY, "w": 0.5}),
    "save_video": (save_video, {"frames": np.zeros((1, 16, 16, 3)), "path": "x.png"}),
    "BlendConfig": (BlendConfig, {}),
    "StepCosts": (StepCosts, {"small": 1, "small_guided": 2, "large": 3, "large_guided": 6}),
    "Step": (Step, dict(index=0, timestep=999.0, sigma=1.0, w=1.0, small=True, large=False)),
    "Plan": (Plan, {"name": "x", "steps": parse_plan("small", GRID).steps, "grid": GRID}),
    "TimeGrid": (TimeGrid, {"sigmas": GRID.sigmas, "timesteps": GRID.timesteps}),
    "Prompt": (Prompt, {"conditional": torch.zeros(1, 4, 8)}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, base = FUNCTIONS[name]
    assert raw_errors(function, base, parameters(function)) == {}


def test_every_public_name_is_tried():
    errors = [n for n in nexus_rt.__all__ if isinstance(getattr(nexus_rt, n), type)]
    errors = [n for n in errors if issubclass(getattr(nexus_rt, n), Exception)]
    tried = {"NexusPipeline", "NexusOutput", "__version__", *FUNCTIONS, *errors}
    assert set(nexus_rt.__all__) == tried
    ours = [n for n in vars(NexusPipeline) if not n.startswith("_")]
    ours += [n for n in dir(NexusPipeline) if not n.startswith("_")]
    methods = {n for n in ours if callable(getattr(NexusPipeline, n))}
    without = {"cancel", "exclusive", "formats", "shared", "mro"}
    tried = {*METHODS, "encode_context", "from_pretrained", "from_engines"}
    assert methods - without == tried | {"set_progress_bar_config"}


@pytest.mark.parametrize("words", ("seed", "return_dict", "image", "attention_kwargs"))
def test_unknown_arguments_name_ours(pipe, words):
    with pytest.raises(nexus_rt.InputError, match=f"has no argument '{words}': "):
        pipe(PROMPT, **{words: 1})
