"""The small generator's context: what is in it, once per prompt, and gone when asked."""

import shutil

import numpy as np
import pytest
import torch

from nexus_rt import NexusPipeline
from nexus_rt.components.context import unpad
from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.loading.connector import save_connector
from nexus_rt.models.connector import SPECIAL_TOKENS, Connector, ConnectorConfig
from tests.omnivideo import make_llm
from tests.refusals import refuses

CONFIG = ConnectorConfig(
    llm_hidden_size=40,
    vision_dim=16,
    text_dim=32,
    adapter_queries=6,
    num_layers=1,
    num_heads=2,
    max_context_len=96,
)
RUN = dict(num_inference_steps=4, plan="reference")


def make_connector(config=CONFIG, unconditional=True):
    torch.manual_seed(3)
    connector = Connector(config)
    connector.special_tokens = {name: torch.randn(1, config.text_dim) for name in SPECIAL_TOKENS}
    if unconditional:
        connector.unconditional_text = torch.randn(2, config.text_dim)
        connector.unconditional_hidden = torch.randn(5, config.llm_hidden_size)
    return connector


@pytest.fixture(scope="module")
def steered_pair(tiny_pair, tmp_path_factory):
    """The tiny pair with an understanding model and a connector."""
    root = shutil.copytree(tiny_pair, tmp_path_factory.mktemp("steered") / "pair")
    make_llm(root / "understanding")
    save_connector(make_connector(), root / "connector", torch.float32)
    return root


@pytest.fixture(scope="module")
def pipe(steered_pair):
    pipe = NexusPipeline.from_pretrained(steered_pair)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator():
    return torch.Generator().manual_seed(0)


class Spy:
    """Counts calls of a module's forward, and keeps what an engine was told."""

    def __init__(self, monkeypatch, pipe):
        self.counts, self.told = {"llm": 0, "connector": 0, "small": 0, "large": 0}, {}
        pipe.context.understanding.load()
        pipe.context.load()
        self._count(monkeypatch, pipe.context.understanding, "model", "llm")
        self._count(monkeypatch, pipe.context, "connector", "connector")
        for name in ("small", "large"):
            engine = pipe.engines[name]
            prepare, velocity = engine.prepare, engine.velocity

            def told(context, name=name, prepare=prepare):
                self.told[name] = context.clone()
                return prepare(context)

            def run(*args, name=name, velocity=velocity):
                self.counts[name] += 1
                return velocity(*args)

            monkeypatch.setattr(engine, "prepare", told)
            monkeypatch.setattr(engine, "velocity", run)

    def _count(self, monkeypatch, owner, attribute, name):
        module = getattr(owner, attribute)
        forward = module.forward

        def counted(*args, **kwargs):
            self.counts[name] += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counted)


def test_all_of_it_runs_once_per_prompt(pipe, monkeypatch):
    spy = Spy(monkeypatch, pipe)
    pipe(["the red panda", "a circle"], generator=generator(), **RUN)
    # one reading of each prompt, one adapter run each and one for the negative branch; four steps
    # of both generators
    assert spy.counts == {"llm": 2, "connector": 3, "small": 4, "large": 4}


def test_each_generator_is_told_its_own(pipe, monkeypatch):
    spy = Spy(monkeypatch, pipe)
    pipe("the red panda", generator=generator(), **RUN)
    text = pipe.text.encode(["the red panda"])
    connector, markers = pipe.context.connector, pipe.context.connector.special_tokens
    assert spy.told["large"].shape == (2, 512, 32) and torch.equal(spy.told["large"][0], text[0])
    assert (
        torch.equal(spy.told["large"][1, :2], connector.unconditional_text)
        and not spy.told["large"][1, 2:].any()
    )
    with torch.no_grad():
        adapter = connector(pipe.context.understanding.hidden_states("the red panda"))[0]
        none = connector(connector.unconditional_hidden[None])[0]
    words = unpad(text[0])
    rows = [
        markers["<ipl_st>"],
        adapter,
        markers["<ipl_ed>"],
        markers["<prp_st>"],
        words,
        markers["<prp_ed>"],
    ]
    wanted = torch.cat(rows)
    small = spy.told["small"]
    assert small.shape == (2, 96, 32) and len(words) == 4
    assert torch.equal(small[0, : len(wanted)], wanted) and not small[0, len(wanted) :].any()
    rows = [
        markers["<ipl_st>"],
        none,
        markers["<ipl_ed>"],
        markers["<prp_st>"],
        connector.unconditional_text,
        markers["<prp_ed>"],
    ]
    assert torch.equal(small[1, : len(torch.cat(rows))], torch.cat(rows))


def test_understanding_changes_the_small_generator_only(pipe, tiny_pipe):
    a, b = (
        p("the red panda", generator=generator(), num_inference_steps=4, plan="small").frames
        for p in (pipe, tiny_pipe)
    )
    assert np.abs(a - b).max() > 1e-3
    # without the negative branch
    same = dict(generator=None, num_inference_steps=4, plan="large", guidance_scale=1.0)
    a, b = (
        p("the red panda", **{**same, "generator": generator()}).frames for p in (pipe, tiny_pipe)
    )
    assert np.array_equal(a, b)


def test_a_single_frame_takes_the_image_template_and_the_first_token(pipe, monkeypatch):
    spy = Spy(monkeypatch, pipe)
    pipe("the red panda", num_frames=1, generator=generator(), **RUN)
    connector = pipe.context.connector
    with torch.no_grad():
        adapter = connector(pipe.context.understanding.hidden_states("the red panda", True), True)[
            0
        ]
    assert len(adapter) == 6 and torch.equal(spy.told["small"][0, 1:7], adapter)
    assert torch.equal(spy.told["small"][0, 7:8], connector.special_tokens["<ipl_ed>"])


def test_a_negative_prompt_replaces_the_stored_text(pipe, monkeypatch):
    spy = Spy(monkeypatch, pipe)
    pipe("the red panda", "blue", generator=generator(), **RUN)
    blue = unpad(pipe.text.encode(["blue"])[0])
    # encoded beside the prompt: rounding
    assert torch.allclose(spy.told["large"][1, : len(blue)], blue, atol=1e-5)
    # 1 + 24 + 1 adapter rows, <prp_st>
    assert torch.allclose(spy.told["small"][1, 27 : 27 + len(blue)], blue, atol=1e-5)


def test_given_contexts_are_used(pipe):
    embeds = pipe.encode_prompt("the red panda")
    contexts = pipe.encode_context("the red panda", *embeds)
    wanted = pipe("the red panda", generator=generator(), **RUN).frames
    told = dict(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    context = dict(context_embeds=contexts[0], negative_context_embeds=contexts[1])
    given = pipe(**told, **context, generator=generator(), **RUN).frames
    assert np.array_equal(wanted, given)
    with refuses("missing", "prompt", InputError):
        pipe(**told, **RUN)
    pipe(**told, num_inference_steps=2, plan="large")  # does not need it


def test_several_videos_of_a_prompt_share_one_reading(pipe, monkeypatch):
    spy = Spy(monkeypatch, pipe)
    frames = pipe(
        ["the red panda", "a circle"], num_videos_per_prompt=2, generator=generator(), **RUN
    ).frames
    assert spy.counts["llm"] == 2 and frames.shape[0] == 4
    small = spy.told["small"]
    assert (
        torch.equal(small[0], small[1])
        and torch.equal(small[2], small[3])
        and (small[0] != small[2]).any()
    )


def test_encoders_can_be_dropped_before_denoising(steered_pair, pipe):
    lean = NexusPipeline.from_pretrained(steered_pair, keep_encoders=False)
    lean.set_progress_bar_config(disable=True)
    held = []

    def look(p, step, timestep, tensors):
        held.append((p.text.model, p.context.model, p.context.understanding.model))
        return {}

    frames = lean("the red panda", generator=generator(), callback_on_step_end=look, **RUN).frames
    assert held == [(None, None, None)] * 4
    assert np.array_equal(frames, pipe("the red panda", generator=generator(), **RUN).frames)
    # read again when needed
    assert np.array_equal(frames, lean("the red panda", generator=generator(), **RUN).frames)


def test_everything_computes_in_the_dtype_asked_for(steered_pair):
    pipe = NexusPipeline.from_pretrained(steered_pair, torch_dtype=torch.bfloat16)
    context, negative = pipe.encode_context("the red panda", *pipe.encode_prompt("the red panda"))
    assert context.dtype == negative.dtype == torch.bfloat16
    assert {
        p.dtype
        for m in (pipe.context.connector, pipe.context.understanding.model)
        for p in m.parameters()
    } == {torch.bfloat16}


def test_a_checkpoint_without_stored_negatives_reads_an_empty_prompt(own_pair):
    make_llm(own_pair / "understanding")
    save_connector(make_connector(unconditional=False), own_pair / "connector", torch.float32)
    pipe = NexusPipeline.from_pretrained(own_pair)
    text, none = pipe.encode_prompt("the red panda")
    assert torch.allclose(none, pipe.text.encode([""]), atol=1e-5)
    _, negative = pipe.encode_context("the red panda", text, none)
    with torch.no_grad():
        adapter = pipe.context.connector(pipe.context.understanding.hidden_states(""))[0]
    assert torch.equal(negative[0, 1:25], adapter)


def test_parts_that_do_not_belong_together(own_pair, tiny_pair):
    make_llm(own_pair / "understanding", hidden=24)
    save_connector(make_connector(), own_pair / "connector", torch.float32)
    with refuses("mismatch", "hidden_size", ModelError):
        NexusPipeline.from_pretrained(own_pair)
    wide = ConnectorConfig(
        llm_hidden_size=24, vision_dim=16, text_dim=48, adapter_queries=6, num_layers=1, num_heads=2
    )
    save_connector(make_connector(wide), own_pair / "connector", torch.float32)
    with pytest.raises(ModelError) as error:
        NexusPipeline.from_pretrained(own_pair)
    assert "width 48" in str(error.value)
    with pytest.raises(InputError) as error:
        NexusPipeline.from_pretrained(tiny_pair, connector=own_pair / "connector")
    assert "understanding=" in str(error.value)


def test_a_small_generator_of_ones_own_is_not_steered_by_the_pairs(steered_pair, tiny_pair):
    """The connector belongs to the pair's own small generator."""
    assert NexusPipeline.from_pretrained(steered_pair, small=tiny_pair / "small").context is None


def test_a_pipeline_without_one_says_so(tiny_pipe):
    with refuses("missing", "understanding", ModelError):
        tiny_pipe.encode_context("x", *tiny_pipe.encode_prompt("x"))


def test_unpad_keeps_zero_rows_inside():
    rows = torch.tensor([[1.0, 0], [0, 0], [0, 2], [0, 0]])
    assert torch.equal(unpad(rows), rows[:3]) and unpad(rows[1:2]).shape == (0, 2)


def test_the_language_model_reads_the_prompt_raw(pipe, monkeypatch):
    """As published: stripped and no more; cleaning is for UMT5."""
    read = []
    right = pipe.context.understanding.hidden_states
    monkeypatch.setattr(
        pipe.context.understanding, "hidden_states", lambda p, *a: (read.append(p), right(p, *a))[1]
    )
    prompt = "  the  red &amp; blue\u00a0panda\n moves "
    text, none = pipe.encode_prompt(prompt)
    pipe.encode_context(prompt, text, none)
    assert read == [prompt.strip()]
    assert torch.equal(text, pipe.encode_prompt("the red & blue panda moves")[0])
