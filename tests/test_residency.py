"""What is in memory when: planned from bytes, walked by engines that record their calls on a clock
that is simulated."""

import threading
from dataclasses import asdict

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nexus_rt import InputError, NexusPipeline
from nexus_rt.core.amounts import parse_bytes
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.method.generator import Prompt
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import time_grid
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.pipeline.memory_use import MemoryUse, activation_bytes
from nexus_rt.pipeline.residency import MODES, Residency, plan_residency
from tests.refusals import refuses

GB = 10**9
PARTS = {
    "text encoder": MemoryUse(11 * GB, GB),
    "small": MemoryUse(3 * GB, GB),
    "large": MemoryUse(28 * GB, 4 * GB),
    "vae": MemoryUse(GB // 2, 5 * GB),
}
SANDWICH = parse_plan("small:4 large:4 small:2", time_grid(10))
BRIDGED = parse_plan("small:4 bridge:2 large:4", time_grid(10))


@pytest.mark.parametrize(
    "plan, budget, mode, peak",
    [
        (SANDWICH, None, "resident", 42.5 + 5),
        (SANDWICH, 48, "resident", 47.5),
        (SANDWICH, 47, "freed", 31 + 4),
        (SANDWICH, 34.9, "swapped", 28 + 4),
        (BRIDGED, 36, "freed", 35),
        (SANDWICH, 32, "swapped", 32),
    ],
)
def test_the_most_comfortable_mode_that_fits(plan, budget, mode, peak):
    found = plan_residency(plan, PARTS, None if budget is None else int(budget * GB))
    assert (found.mode, found.peak) == (mode, peak * GB)
    assert f"{mode}: at most {peak:.2f} GB" in found.table()


def test_a_large_working_memory_makes_prefetching_worth_it():
    """While the small one runs, the large one's weights fit beside it; both and the large one's
    activations do not."""
    parts = {"small": MemoryUse(3 * GB, GB), "large": MemoryUse(28 * GB, 4 * GB)}
    plan = parse_plan("small:4 large:6", time_grid(10))
    assert [plan_residency(plan, parts, b * GB).mode for b in (35, 33, 32)] == [
        "resident",
        "prefetched",
        "prefetched",
    ]
    phases = plan_residency(plan, parts, 33 * GB).phases
    assert [(p.present, p.arriving, p.peak // GB) for p in phases] == [
        (("small",), ("large",), 32),
        (("large",), (), 32),
    ]


def test_a_budget_that_cannot_be_met_names_the_smallest_that_would_do():
    for plan, budget, phase, least in (
        (SANDWICH, 30, "'large'", "32.00 GB"),
        (BRIDGED, 34, "'both'", "35.00 GB"),
    ):
        with refuses("out_of_memory", "vram", InputError) as caught:
            plan_residency(plan, PARTS, budget * GB)
        words = str(caught.value)
        assert f"{budget}.00 GB" in words and phase in words and words.count(least) == 2
    with refuses("missing", "large", InputError):
        plan_residency(SANDWICH, {"small": MemoryUse(1)}, GB)


def test_blocks_are_streamed_where_nothing_else_fits():
    parts = {**PARTS, "large": MemoryUse(28 * GB, 4 * GB, streamed=2 * GB)}
    found = plan_residency(SANDWICH, parts, 16 * GB)  # the text encoder, 12 GB, is the most
    assert (found.mode, found.peak) == ("streamed", 12 * GB)
    assert [p.peak // GB for p in found.phases] == [12, 4, 6, 4, 5]
    with refuses("out_of_memory", "vram", InputError) as caught:
        plan_residency(SANDWICH, parts, 10 * GB)
    assert "12.00 GB" in str(caught.value)


def test_a_plan_walks_while_both_generators_are_streamed(tiny_pipe):
    plan = tiny_pipe.make_plan("small:2 bridge:1 large:2", 5)
    engines = {n: TorchEngine(e.model) for n, e in tiny_pipe.engines.items()}
    size = ClipSize(48, 32, 5)
    decided = plan_residency(plan, tiny_pipe.call_parts(size), mode="streamed")
    streamed, phase = (
        engines["large"].streamed_bytes,
        next(p for p in decided.phases if p.runs == ("large",)),
    )
    assert streamed <= engines["large"].nbytes and phase.peak >= streamed
    prompts, noise = tiny_pipe.encode("a red circle"), torch.randn(1, 16, *size.latent)
    wanted = sample(noise, plan, engines, prompts)
    residency = Residency(decided, engines)
    seen = []
    watch = lambda step, _: seen.append(
        [engines[n].model.stream is not None for n in ("small", "large")]
    )
    got = sample(noise, plan, engines, prompts, hooks=Hooks(residency=residency, on_step=watch))
    assert (
        torch.equal(got, wanted)
        and seen == [[True, False]] * 2 + [[True, True]] + [[False, True]] * 2
    )
    engines["large"].unload()


@pytest.mark.parametrize(
    "text, wanted",
    [("24GB", 24 * GB), ("22.5GiB", int(22.5 * 2**30)), ("800 mb", 800 * 10**6), ("7", 7)],
)
def test_amounts_of_memory(text, wanted):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize(
    "text, code",
    [
        *((t, "invalid_value") for t in ("", "GB", "-3GB", "12XB", "1,5GB", "1e9", "1_000")),
        *((t, "invalid_value") for t in ("0x10", "nan", "inf", "9" * 400, "9" * 400 + "GB")),
        *((t, "invalid_value") for t in ("\u0663GB", "\ud800GB", "1\0", -1, True, None, [1])),
        *((t, "invalid_value") for t in (float("nan"), float("inf"), 10**400, -(10**5000))),
        *((t, "out_of_range") for t in ("0GB", "0.4", "99999999999GB", 0.4, 0)),
    ],
    ids=range(28),
)
def test_what_is_no_amount_of_memory(text, code):
    with refuses(code, "vram", InputError):
        parse_bytes(text)


def test_working_memory_of_wan_14b_at_480p():
    """65,520 tokens of a guided step, two bytes: a fused projection and a normed stream, or the
    feed-forward's middle."""
    wan = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824)
    assert activation_bytes(wan, ClipSize(832, 480, 81)) == 2 * 32760 * (5 * 5120 + 4 * 5120) * 2


class Clock:
    """Simulated seconds, and who was where."""

    def __init__(self):
        self.now, self.events, self.lock = 0.0, [], threading.Lock()

    def note(self, *event):
        with self.lock:
            self.events.append((round(self.now, 3), *event))


class Recorded:
    """An engine whose weights take time to come, and whose steps take time to run, on a simulated
    clock."""

    device = torch.device("cpu")

    def __init__(self, name, clock, load_s, step_s):
        self.name, self.clock, self.load_s, self.step_s = name, clock, load_s, step_s
        self.resident, self.ready_at, self.waited = False, 0.0, []

    def load(self):
        if self.resident:
            return
        self.resident = True
        self.ready_at = self.clock.now + self.load_s
        self.clock.note(self.name, "load")

    def unload(self):
        assert self.resident
        self.resident = False
        self.clock.note(self.name, "unload")

    def prepare(self, context):
        return context.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    def velocity(self, latents, timestep, context):
        assert self.resident, f"{self.name} ran without its weights"
        self.waited.append(max(0.0, self.ready_at - self.clock.now))
        self.clock.now = max(self.clock.now, self.ready_at) + self.step_s
        return 0.5 * latents.repeat(len(context) // len(latents), 1, 1, 1, 1) + context


def walk(mode, plan, load_s=2.0):
    clock = Clock()
    engines = {
        "small": Recorded("small", clock, 0.2, 0.4),
        "large": Recorded("large", clock, load_s, 2.0),
    }
    parts = {"small": MemoryUse(3), "large": MemoryUse(28)}
    residency = Residency(plan_residency(plan, parts, mode=mode), engines)
    prompt = Prompt(torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
    sample(
        torch.zeros(1, 4, 1, 2, 2),
        plan,
        engines,
        dict.fromkeys(engines, prompt),
        hooks=Hooks(residency=residency),
    )
    residency.close()
    return engines, clock


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plan", [SANDWICH, BRIDGED], ids=["sandwich", "bridged"])
def test_every_step_finds_its_weights_in_every_mode(mode, plan):
    _, clock = walk(mode, plan)
    loads = [e for e in clock.events if e[2] == "load"]
    if mode in ("resident", "freed"):
        assert (
            sorted(e[1] for e in loads) == ["large", "small"]
            and {e[0] for e in loads} == {0.0}
            and not [e for e in clock.events if e[2] == "unload"]
        )
    elif plan is SANDWICH:
        # prefetched, it is about to run again and does not leave
        back = ["small"] if mode in ("swapped", "streamed") else []
        assert sorted(e[1] for e in loads) == ["large", "small", *back]
    else:
        assert [e[1:] for e in clock.events if e[2] == "unload"] == [("small", "unload")]


def test_a_prefetched_engine_is_there_when_it_is_needed():
    """Four small steps of 0.4 s cover 1.2 s of loading; swapped, the first large step waits for all
    of it."""
    prefetched, _ = walk("prefetched", SANDWICH, load_s=1.2)
    swapped, _ = walk("swapped", SANDWICH, load_s=1.2)
    step = prefetched["large"].step_s
    assert (
        prefetched["large"].waited[0] + step
    ) / step <= 1.25  # the bound for the step after the swap
    assert swapped["large"].waited[0] == pytest.approx(1.2)
    assert sum(prefetched["large"].waited[1:]) == 0


def test_an_engine_that_fails_to_come_says_so_where_it_is_needed():
    clock = Clock()
    engines = {"small": Recorded("small", clock, 0, 1), "large": Recorded("large", clock, 0, 1)}

    def broken():
        raise MemoryError("out of memory")

    engines["large"].load = broken
    plan = parse_plan("small:2 large:2", time_grid(4))
    residency = Residency(
        plan_residency(plan, {"small": MemoryUse(1), "large": MemoryUse(1)}, mode="prefetched"),
        engines,
    )
    residency.enter(0)
    residency.enter(1)
    with pytest.raises(MemoryError, match="out of memory"):
        residency.enter(2)
    residency.close()


def test_a_pipeline_keeps_to_its_budget(tiny_pair, tiny_pipe):
    options = dict(
        height=32,
        width=32,
        num_frames=1,
        num_inference_steps=4,
        plan="small:2 large:2",
        output_type="latent",
    )
    wanted = tiny_pipe("a red circle", generator=torch.Generator().manual_seed(0), **options)
    whole = tiny_pipe.plan_residency(wanted.plan, ClipSize(32, 32, 1))
    least = plan_residency(
        wanted.plan, {n: MemoryUse(0) for n in ("small", "large")}, mode="swapped"
    )
    assert whole.mode == "resident" and [p.name for p in whole.phases] == [
        "encode",
        "small",
        "large",
        "decode",
    ]
    pipe = NexusPipeline.from_pretrained(tiny_pair, vram=whole.peak - 1)
    pipe.set_progress_bar_config(disable=True)
    got = pipe("a red circle", generator=torch.Generator().manual_seed(0), **options)
    # freed before denoising
    assert torch.equal(got.frames, wanted.frames) and pipe.text.model is None
    assert (
        pipe.plan_residency(wanted.plan, ClipSize(32, 32, 1)).mode == "freed"
        and least.mode == "swapped"
    )
    with refuses("out_of_memory", "vram", InputError):
        NexusPipeline.from_pretrained(tiny_pair, vram="10KB")("a", **options)


class Lives(TorchDispatchMode):
    """Follows the storages that operations make, and the most bytes that are alive at once."""

    def __init__(self, known):
        super().__init__()
        self.known, self.alive, self.peak = {t.untyped_storage()._cdata for t in known}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(num_attention_heads=12, ffn_dim=8960), dict(ffn_dim=40000)],
    ids=["14B", "1.3B", "wide"],
)
def test_working_memory_is_what_a_forward_holds_at_most(fields, monkeypatch):
    """Every tensor's life on the meta device, the kernels' outputs as they allocate them."""
    from nexus_rt.models import wan
    from nexus_rt.ops.block_ops import Ops

    config = WanConfig(num_layers=2, **fields)
    size, batch, tokens = ClipSize(832, 480, 17), 2, 512
    new = torch.empty_like

    def heads(qkv, *rest):
        shape = (*qkv.shape[:2], config.num_attention_heads, config.attention_head_dim)
        return qkv.new_empty(shape), qkv.new_empty(shape)

    ops = Ops(
        "meta",
        lambda x, scale, shift, eps, y=None, gate=None: (x if y is None else new(x), new(x)),
        heads,
        lambda *grid: (None, None),
        lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)),
    )
    monkeypatch.setattr(wan, "attend", lambda q, k, v, bias, backend: new(q))
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: new(x))  # one kernel on a GPU
    with torch.device("meta"), torch.no_grad():
        model = wan.WanTransformer(config).bfloat16()
        for module in model.modules():
            if hasattr(module, "ops"):
                module.ops = ops
        shape = (batch, tokens, config.num_attention_heads, config.attention_head_dim)
        keys, values = (
            [torch.empty(shape, dtype=torch.bfloat16) for _ in model.blocks] for _ in range(2)
        )
        context = wan.WanContext(keys, values, None)
        latents, timestep = torch.empty(batch, 16, *size.latent), torch.empty(())
        with Lives([*model.parameters(), *keys, *values, latents, timestep]) as lives:
            model(latents, timestep, context)
    estimate = activation_bytes(asdict(config), size, batch)
    assert lives.peak == pytest.approx(estimate, rel=0.02)


def test_a_guided_14b_at_480p_is_priced_as_measured():
    """Six gigabytes: 7.4 were alive before what is dead was dropped."""
    bytes_ = activation_bytes(asdict(WanConfig()), ClipSize(832, 480, 81))
    assert bytes_ == pytest.approx(6.04e9, rel=0.01)


def test_pinned_host_memory_is_priced():
    plan = parse_plan("small:2 large:4", time_grid(6))
    parts = {n: MemoryUse(100, 10, 20, 64) for n in ("small", "large")}
    assert plan_residency(plan, parts, mode="swapped").host == 128
    assert "pinned host memory: 0.0 MB" in plan_residency(plan, parts, mode="swapped").table()
    assert plan_residency(plan, parts, mode="resident").host == 0
