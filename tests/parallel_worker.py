"""One of the processes of tests/test_parallel.py: what it computes alone against what all compute
together."""

import os
import signal
import sys

import torch

from nexus_rt.bench.presets import random_pipeline, random_prompt
from nexus_rt.core.size import ClipSize
from nexus_rt.parallel.layout import make_mesh, parse_layout

CONFIG = dict(
    num_attention_heads=4, attention_head_dim=16, ffn_dim=64, num_layers=2, text_dim=24, freq_dim=32
)
SIZES = (ClipSize(48, 32, 5), ClipSize(80, 48, 5), ClipSize(80, 48, 1))
PLANS = ("small:1 bridge:2 large:*", "reference", "small:2 large:*@1")


def pipeline(size):
    torch.manual_seed(3)
    configs = {"small": CONFIG, "large": {**CONFIG, "num_layers": 3}}
    decoder = dict(base_dim=4, num_res_blocks=1)
    pipe = random_pipeline(configs, torch.float32, torch.device("cpu"), size, decoder=decoder)
    pipe.set_progress_bar_config(disable=True)
    for name, engine in pipe.engines.items():  # large enough that errors would show
        for p in engine.model.parameters():
            p.data += 0.05 * torch.randn(
                p.shape, generator=torch.Generator().manual_seed(len(name))
            )
    pipe.vae.load()
    return pipe


def call(pipe, prompt, plan, size, **options):
    options = {"generator": torch.Generator().manual_seed(1), **options}
    return pipe(
        plan=plan,
        num_inference_steps=5,
        output_type="latent",
        guidance_scale=5.0,
        **size.options,
        **prompt,
        **options,
    ).frames


def compare(text):
    mesh = make_mesh(parse_layout(text), torch.device("cpu"))
    for size, plans in zip(SIZES, (PLANS, PLANS[:1], PLANS[1:2]), strict=True):
        alone = pipeline(size)
        prompt = random_prompt(alone, torch.float32)
        together = pipeline(size).shared(mesh)
        for plan in plans:
            wanted, got = call(alone, prompt, plan, size), call(together, prompt, plan, size)
            error = float((got - wanted).norm() / wanted.norm())
            assert error < 1e-5, (text, size, plan, error)
            seen, shown = (p.decode(wanted, "pt") for p in (alone, together))
            assert seen.shape == shown.shape and (seen - shown).abs().max() < 1e-5, (text, size)
        # without a generator, all draw the same noise
        drawn = call(together, prompt, PLANS[0], size, generator=None)
        others = mesh.gathered(drawn, "all")
        assert all(torch.equal(drawn, other) for other in others)
        assert not torch.equal(drawn, call(together, prompt, PLANS[0], size, generator=None))
        asked = together.parallel.of_first(lambda: os.environ["RANK"])
        assert asked == "0"  # as a rewriter's answer, which may differ
        torch.distributed.barrier()
    mesh.watch.close()
    if mesh.rank == 0:
        print(text, flush=True)


def die(text, how):
    mesh = make_mesh(parse_layout(text), torch.device("cpu"))
    pipe = pipeline(SIZES[0])
    prompt = random_prompt(pipe, torch.float32)
    pipe = pipe.shared(mesh)

    def on_step(pipe, index, timestep, tensors):
        if index == 1 and mesh.rank == mesh.layout.size - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("its disk is gone")
        return {}

    call(pipe, prompt, "reference", SIZES[0], callback_on_step_end=on_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *layouts = sys.argv[1:]
    for text in layouts:
        compare(text) if what == "compare" else die(text, what)
