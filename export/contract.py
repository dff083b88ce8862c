"""The inputs and outputs of an engine's graphs in words: what a consumer that has only the
artefacts needs to know."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from nexus_rt.core.devices import dtype_name
from nexus_rt.export.dynamic_shapes import Traced, split

MEANING = {
    "latents": (
        "noisy latents of the step, as the scheduler holds them (normalised: (z - latents_mean) /"
        " latents_std); for the VAE one latent frame of the VAE's own z = latents * latents_std +"
        " latents_mean"
    ),
    "timestep": "scalar, 0 to 1000: 1000 sigma",
    "keys": "cross-attention keys of every block, as the graph `context` makes them",
    "values": "cross-attention values of every block, as the graph `context` makes them",
    "bias": (
        "added to every score of a token: 0 for a token, log(n) for one that stands for n"
        " zero-padded ones, -inf for none"
    ),
    "velocity": (
        "flow velocity v; with guidance samples 0..B-1 are conditional, B..2B-1 unconditional: v_u"
        " + g (v_c - v_u); the next latents are x + (sigma_next - sigma) v"
    ),
    "embeds": (
        "text embeddings of the prompt, zero-padded; tokens after the first padded one may be left"
        " out (see bias)"
    ),
    "ids": "token ids of the tokenizer beside the engine",
    "mask": "1 for a token, 0 for padding",
    "states": "last hidden states; those of padding are to be set to zero",
    "video": (
        "frames in [-1, 1]: one of the first latent frame, scale_factor_temporal of every other"
    ),
}


def public(dimension: str) -> str:
    """One of our symbols as consumers read it: latent cells, not pairs of them."""
    factor, name = split(dimension)
    cells = {"rows": "height", "columns": "width"}.get(name or "")
    if cells and factor % 2 == 0:
        return cells if factor == 2 else f"{factor // 2}*{cells}"
    return dimension


def _placeholders(traced: Traced) -> list[Node]:
    """The program's nodes of the inputs, in order; weights come before them."""
    every = [n for n in traced.program.graph.nodes if n.op == "placeholder"]
    return every[-len(traced.inputs) :]


def symbols(traced: Traced) -> dict[str, str]:
    """The program's own names of dynamic dimensions (`s22`, `2*s5`) -> ours.

    Raises:
        ValueError: two lengths would get one name; ONNX Runtime takes axes of one name for equal
            and gives a smaller tensor's memory to a larger one.
    """
    texts: dict[str, str] = {}
    for node, shape in zip(_placeholders(traced), traced.shapes.values(), strict=True):
        value = node.meta.get("val")
        for own, ours in zip(getattr(value, "shape", ()), shape, strict=False):
            if not isinstance(own, int) and isinstance(ours, str):
                texts[str(own)] = public(ours)
    for name in set(texts.values()):
        if len(own := sorted(k for k, v in texts.items() if v == name)) > 1:
            raise ValueError(f"the lengths {', '.join(own)} of a graph would all be named {name}.")
    return texts


def rename(dimension: str, names: dict[str, str]) -> str:
    """A dimension's expression in our names: with `2*s5` the width, `8*s5` is `4*width`."""
    if dimension in names:
        return names[dimension]
    if product := re.fullmatch(r"(\d+)\*(\w+)", dimension):
        for known, ours in names.items():
            factor, _, symbol = known.rpartition("*")
            if symbol == product[2] and int(product[1]) % int(factor or 1) == 0:
                return f"{int(product[1]) // int(factor or 1)}*{ours}"
    plain = {k: v for k, v in names.items() if re.fullmatch(r"\w+", k)}
    return re.sub(r"\w+", lambda m: plain.get(m[0], m[0]), dimension)


def _entry(name: str, value: Any, names: dict[str, str]) -> dict[str, Any]:
    shape = [int(d) if isinstance(d, int) else rename(str(d), names) for d in value.shape]
    root = re.sub(r"^new_|_\d+$", "", name)
    root = "state" if root.startswith("state") and root != "states" else root
    words = (
        MEANING.get(root)
        or "convolutions' cache of earlier frames; new_state_i of a call is state_i of the next"
    )
    return {
        "name": name,
        "shape": shape,
        "dtype": dtype_name(value.dtype),
        "meaning": words,
    }


def contract(traced: Traced) -> dict[str, list[dict[str, Any]]]:
    """{"inputs", "outputs"}: name, shape (numbers, and names of what varies), dtype and meaning of
    each, in order."""
    names = symbols(traced)
    inputs = []
    nodes = zip(traced.inputs.items(), traced.shapes.values(), _placeholders(traced), strict=True)
    for (name, tensor), shape, node in nodes:
        value = node.meta.get("val")
        if hasattr(value, "shape"):
            inputs.append(_entry(name, value, names))
        else:
            inputs.append({**_entry(name, tensor, names), "shape": [*shape]})
    (output,) = [n for n in traced.program.graph.nodes if n.op == "output"]
    values = [a.meta["val"] for a in output.args[0] if isinstance(a, Node)][-len(traced.outputs) :]
    return {
        "inputs": inputs,
        "outputs": [_entry(n, v, names) for n, v in zip(traced.outputs, values, strict=True)],
    }
