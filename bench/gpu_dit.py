"""The DiTs at their true size in the GPU suite: one forward, ours by PyTorch and by Triton,
compiled, and diffusers'."""

from __future__ import annotations

from typing import Any

from nexus_rt.bench.measure import failure, failure_in
from nexus_rt.bench.presets import random_transformer


def dit(suite: Any, name: str) -> dict:
    """One forward, and one block, at 480p x 81 frames: torch and triton kernels, blocks compiled,
    diffusers where it is."""
    import torch

    config = suite.configs[name]
    t, h, w = suite.grid
    model = random_transformer(config, suite.dtype, suite.device)
    latents, timestep = (
        suite.random(1, 16, t, 2 * h, 2 * w),
        torch.tensor(700.0, device=suite.device),
    )
    embeds = torch.zeros(1, 512, model.config.text_dim, dtype=suite.dtype, device=suite.device)
    embeds[:, :40] = suite.random(1, 40, model.config.text_dim)
    dim, length = model.config.dim, suite.tokens
    linear = 2 * length * config["num_layers"] * (6 * dim * dim + 2 * dim * config["ffn_dim"])
    flops = linear + 4 * length * length * dim * config["num_layers"]
    rows: dict[str, Any] = {"tokens": length, "tflop": round(flops / 1e12, 1)}
    outputs: dict[str, Any] = {}
    seen: dict[str, tuple] = {}
    with torch.no_grad():
        for label, kernel in (
            ("torch", "torch"),
            ("triton", "triton"),
            ("torch, blocks compiled", "torch"),
        ):
            with failure_in(rows, label):  # one variant that fails must not take the others with it
                model.use_kernels(kernel)
                context = model.prepare_context(embeds)
                forward = model
                if "compiled" in label:
                    if suite.dry:
                        continue
                    for block in model.blocks:
                        block.compile()
                call = lambda f=forward, c=context: f(latents, timestep, c)
                if suite.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                # a hook would be compiled too; its arguments are those of "torch"
                if "compiled" not in label:
                    hook = model.blocks[-1].register_forward_pre_hook(
                        lambda block, args, k=kernel: seen.setdefault(k, args)
                    )
                outputs[label] = call()
                hook.remove()
                rows[label] = suite.of_roof(suite.ms(call, 3, 1), flops=flops)
                one = suite.ms(lambda block=model.blocks[-1], args=seen[kernel]: block(*args), 5, 1)
                rows[f"block, {label}"] = suite.of_roof(one, flops=flops / config["num_layers"])
                if suite.device.type == "cuda":
                    rows[label]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                first = outputs["torch"].float()
                rows[label]["difference"] = float(
                    (outputs[label].float() - first).abs().max() / first.abs().max()
                )
                if kernel == "triton":  # after the peak: a graph has memory of its own
                    # what launches cost is the difference
                    with failure_in(rows, f"{label}, replayed"):
                        rows[f"{label}, replayed"] = suite.of_roof(
                            suite.ms(call, 3, 1, graph=True), flops=flops
                        )
    del model
    return rows | _diffusers(suite, config, latents, embeds, flops)


def _diffusers(suite: Any, config: dict, latents, embeds, flops: float) -> dict:
    """diffusers' transformer of the same size: eager, and its blocks compiled, as its documentation
    advises."""
    import torch

    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        return {"diffusers": {"failed": "diffusers is not installed here"}}
    except Exception as error:  # one that does not fit the packages here says so in many ways
        return {"diffusers": {"failed": failure(error)}}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    model = model.to_empty(device=suite.device).to(suite.dtype).eval()
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for b in model.buffers():
            b.zero_()
        timestep = torch.tensor([700], device=suite.device)
        call = lambda: model(latents, timestep, embeds, return_dict=False)
        for label in ("diffusers", "diffusers, blocks compiled"):
            if suite.dry and "compiled" in label:
                continue
            with failure_in(rows, label):
                for block in model.blocks if "compiled" in label else ():
                    block.compile()
                if suite.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                rows[label] = suite.of_roof(suite.ms(call, 3, 1), flops=flops)
                if suite.device.type == "cuda":
                    rows[label]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return rows
