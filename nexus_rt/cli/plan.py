"""`nexus-rt plan`: which generator runs at which step, and its price."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nexus_rt.cli.arguments import models, real_number, running, walk
from nexus_rt.cli.pipeline import call_settings, check_device, make_pipeline
from nexus_rt.core.errors import InputError, shown

if TYPE_CHECKING:
    from nexus_rt.bench.roofline import Card
    from nexus_rt.core.size import ClipSize
    from nexus_rt.method.blend_config import BlendConfig
    from nexus_rt.method.guidance import Guidance
    from nexus_rt.method.plan import Plan, StepCosts
    from nexus_rt.method.step import Step
    from nexus_rt.models.wan_config import WanConfig
    from nexus_rt.parallel.layout import Layout
    from nexus_rt.pipeline.pipeline import NexusPipeline

FP8 = ("fp8-dynamic", "fp8-dynamic-all")  # what `--gpu` prices besides bfloat16


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    plan = commands.add_parser(
        "plan",
        parents=[models(), running(), walk()],
        help="print which generator runs at which step, and its price",
    )
    plan.add_argument(
        "--costs",
        metavar="SMALL,LARGE",
        help=(
            "milliseconds of one guided step of each, instead of measuring the models on this"
            " machine"
        ),
    )
    plan.add_argument(
        "--gpu",
        metavar="NAME",
        help=(
            "predict the price on a card that is not here: h100, h200, b200, rtx4090, rtx5090,"
            " l40s; without models, of Wan2.1's 1.3B and 14B (--quantize fp8-dynamic and"
            " --attention auto-fp8 are priced)"
        ),
    )
    plan.add_argument(
        "--parallel",
        metavar="HOW",
        help="with --gpu: the price on several of them, such as cfg=2,ulysses=4",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from nexus_rt.engines.experts import boundaries
    from nexus_rt.pipeline.request import make_request
    from nexus_rt.pipeline.settings import Defaults

    call = call_settings(args)
    check_device(args.device)
    models = args.pair or args.small or args.large or args.engines
    if args.costs is not None:
        parse_costs(args.costs)  # before any model is read
    if args.gpu and args.costs:
        raise InputError(
            "--gpu predicts the prices that --costs gives; pass one of them.",
            code="conflict",
            param="--gpu",
        )
    card, layout = _card(args), _layout(args)
    # prices that are given or predicted need no models
    pipe = make_pipeline(args) if models or not (args.costs or card) else None
    if pipe is None:
        request = make_request(call, Defaults())
    else:
        request = make_request(call, pipe.defaults, boundaries(pipe.engines))
    plan, guidance, size, blend = request.plan, request.guidance, request.size, request.blend
    # a budget that cannot be met is raised before anything is measured
    memory = pipe.plan_residency(plan, size) if pipe and pipe.engines else None
    if card is not None:
        from nexus_rt.bench.roofline import step_costs

        costs = step_costs(_configs(pipe), size, card, *_eight_bits(args))
    elif args.costs or pipe is None:
        costs = parse_costs(args.costs)
    else:
        costs = measured_costs(pipe, size, blend, request.solver)
    _print_steps(plan, costs, guidance, blend)
    _print_totals(plan, costs, guidance)
    print(f"plan with its schedule: {plan.text}")
    if memory is not None:
        print(memory.table())
    if pipe is not None and (args.weights or args.quantize):
        _print_weights(pipe)
    source = "predicted" if card else "as given" if args.costs else "measured on this machine"
    print(
        f"step costs ({source}): small {costs.small_guided:.2f} ms guided, large"
        f" {costs.large_guided:.2f} ms guided, blend {costs.blend:.3f} ms, solver"
        f" {costs.solver:.3f} ms"
    )
    if card is not None:
        _print_prediction(card, pipe, size, args)
        if layout is not None:
            _print_shared(card, layout, plan, guidance, _configs(pipe), size, args)
    return 0


def _layout(args: argparse.Namespace) -> Layout | None:
    """The layout of `--parallel`, which is priced for a card."""
    if args.parallel is None:
        return None
    if args.gpu is None:
        raise InputError(
            "--parallel is priced for a card: pass --gpu too, such as --gpu h100.",
            code="missing",
            param="--gpu",
        )
    from nexus_rt.parallel.layout import parse_layout

    return parse_layout(args.parallel)


def _print_shared(
    card: Card,
    layout: Layout,
    plan: Plan,
    guidance: Guidance,
    configs: dict[str, WanConfig],
    size: ClipSize,
    args: argparse.Namespace,
) -> None:
    """The plan's price on several cards, and what they send each other."""
    from nexus_rt.bench.roofline import shared_price, step_costs
    from nexus_rt.parallel.sequence import check_heads
    from nexus_rt.parallel.volume import step_volume

    for config in configs.values():
        check_heads(layout.ulysses, config.num_attention_heads)
    costs = step_costs(configs, size, card, *_eight_bits(args), layout)
    ms = shared_price(plan, costs, layout, guidance.small, guidance.large)
    print(f"on {layout.size} GPUs ({layout}), predicted from bytes: {ms:.0f} ms in all")
    for name, config in configs.items():
        volume = step_volume(layout, config, size, True).total
        guided = getattr(costs, f"{name}_guided")
        print(
            f"  {name}, a guided step: {guided:.1f} ms, each GPU sends {volume / 1e9:.2f} GB a step"
            f" at {card.link / 1e9:g} GB/s, {1000 * volume / card.link:.1f} ms of it"
        )


def _card(args: argparse.Namespace) -> Card | None:
    """The card of `--gpu`, and whether what is asked of it can be priced."""
    if args.gpu is None:
        return None
    from nexus_rt.bench.roofline import card_of

    if args.quantize not in (None, *FP8):
        raise InputError(
            f"--gpu does not price --quantize {args.quantize}; it prices bfloat16 and"
            f" {' and '.join(FP8)}.",
            code="unsupported",
            param="--quantize",
        )
    return card_of(args.gpu)


def _configs(pipe: NexusPipeline | None) -> dict[str, WanConfig]:
    """Architectures by generator: the pipeline's own, else Wan2.1's."""
    from nexus_rt.models.wan_config import WanConfig

    if pipe is None:
        from nexus_rt.bench.roofline import PAIR

        return PAIR
    configs = {}
    for name, engine in pipe.engines.items():
        exported = getattr(engine, "folder", None)
        configs[name] = (
            engine.model.config
            if exported is None
            else WanConfig.from_dict(dict(exported.manifest.architecture))
        )
    return configs


def _eight_bits(args: argparse.Namespace) -> tuple[str | None, bool]:
    """The weights of `--quantize`, and whether attention is in fp8."""
    return args.quantize, args.attention in ("auto-fp8", "triton-fp8")


def _print_prediction(
    card: Card, pipe: NexusPipeline | None, size: ClipSize, args: argparse.Namespace
) -> None:
    """What the prices are made of, and what they rest on."""
    from nexus_rt.bench.roofline import assumptions, forward_parts, memory_line, vae_ms

    configs = _configs(pipe)
    for name, config in configs.items():
        p = forward_parts(config, size, card, 2, *_eight_bits(args))
        print(
            f"{name}, a guided step: linear {p.linear:.1f} ms, attention {p.attention:.1f},"
            f" memory-bound {p.memory:.1f}"
        )
    print(f"VAE: {vae_ms(size, card):.0f} ms")
    print(memory_line(configs, size, card))
    print("\n".join(assumptions(card)))


def _print_steps(plan: Plan, costs: StepCosts, guidance: Guidance, blend: BlendConfig) -> None:
    """A row a step: timestep, gate, cutoff, generators, their guidance, price, their forwards, and
    what is reused."""
    from nexus_rt.method.plan_options import exact

    gaussian = blend.split == "gaussian"
    cutoff = "sigma" if gaussian else "cutoff"
    width = max(5, *(len(step.runs) for step in plan.steps))
    print(
        f"{'step':>4} {'timestep':>8} {'w':>6} {cutoff:>6}  {'runs':{width}} {'guidance':>11}"
        f" {'ms':>10}  forwards, reuses"
    )
    for step in plan.steps:
        value = blend.sigma(step.w) if gaussian else blend.cutoff(step.w)
        shown = f"{value:6.3f}" if step.blended else "     -"
        running = [name for name in ("small", "large") if getattr(step, name)]
        scales = "/".join(exact(guidance.at(step, name)) for name in running)
        counts = (plan.forwards(step, name, getattr(guidance, name)) for name in running)
        forwards = "/".join(map(str, counts))
        price = plan.step_price(step, costs, guidance.small, guidance.large)
        print(
            f"{step.index:4d} {step.timestep:8.6g} {step.w:6.3f} {shown}  {step.runs:{width}}"
            f" {scales:>11} {price:10.2f}  {', '.join([forwards, *_notes(step)])}"
        )


def _notes(step: Step) -> list[str]:
    """What a step reuses, and whether it begins on re-noised latents."""
    notes = ["re-noised"] if step.renoise else []
    notes += [compute for g in ("small", "large") if (compute := step.compute(g)) != "full"]
    if step.threshold is not None:
        from nexus_rt.method.plan_options import exact

        notes.append(f"velocity below {exact(step.threshold)}")
    return notes


def _print_weights(pipe: NexusPipeline) -> None:
    """Which matrices of each engine are kept in which format, and which are left as they are."""
    from nexus_rt.engines.experts import engines_by_name
    from nexus_rt.loading.packing import left_dense

    formats = pipe.formats()
    for name, engine in engines_by_name(pipe.engines).items():
        kept = ", ".join(f"{n} {kind}" for kind, n in formats[name].items())
        print(f"weights of {name}: {kept}; not quantised: {', '.join(left_dense(engine.model))}")


def _print_totals(plan: Plan, costs: StepCosts, guidance: Guidance) -> None:
    """The plan's forwards and price, and those of the published schedule over the same steps."""
    from nexus_rt.method.plan_text import parse_plan

    totals = []
    for each in (plan, parse_plan("reference", plan.grid)):
        count = each.evaluations(guidance.small, guidance.large)
        totals.append(each.price(costs, guidance.small, guidance.large))
        print(
            f"{each.name}: {'at most ' if each.adaptive else ''}{count['small']} small and"
            f" {count['large']} large forwards, {totals[-1]:.1f} ms",
            end="",
        )
        if len(totals) == 1:
            print()
    ours, published = totals
    print(f"; this plan takes {100 * ours / published:.0f}% of it ({published / ours:.2f}x faster)")


def parse_costs(text: str) -> StepCosts:
    """`--costs`: milliseconds of a guided step of each generator."""
    from nexus_rt.method.plan import StepCosts

    try:
        small, large = (real_number(x) for x in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        small = large = 0.0
    if not all(1e-6 <= ms <= 1e12 for ms in (small, large)):
        raise InputError(
            f"--costs is {shown(text)}; expected two numbers of milliseconds, such as 750,4600.",
            param="--costs",
        )
    return StepCosts.of_forwards({"small": small / 2, "large": large / 2})


def measured_costs(
    pipe: NexusPipeline, size: ClipSize, blend: BlendConfig, solver: str
) -> StepCosts:
    """Milliseconds of a step's parts on this machine, at a size."""
    from nexus_rt.pipeline.costs import measure_step_costs, step_calls

    pipe.grid.check(size)
    prompts = pipe.encode("a prompt", single_frame=size.frames == 1)
    latents = pipe.prepare_latents(1, size)
    calls = step_calls(pipe.engines, prompts, latents, blend, solver, pipe.kernels)
    return measure_step_costs(calls, device=latents.device)
