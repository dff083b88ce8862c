"""Single files and folders as people have them: published key names and layouts at tiny
dimensions."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from tests.omnivideo import original_t5_names, original_vae_names, original_wan_names

# heads are 128 wide, as in every published Wan: nothing else says how many there are
WAN = dict(
    num_attention_heads=2,
    attention_head_dim=128,
    num_layers=2,
    ffn_dim=512,
    text_dim=32,
    freq_dim=32,
)
COMFY = "model.diffusion_model."
QUANTISED = ("self_attn.", "cross_attn.", "ffn.")  # what publishers keep in fewer bits


def wan_model(seed=3, **changes):
    """diffusers' transformer, its tables not at zero."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**WAN, **changes}).eval()


def wan_state(seed=3, **changes):
    """Wan's own names, as single files have them."""
    return {
        k: v.clone() for k, v in original_wan_names(wan_model(seed, **changes).state_dict()).items()
    }


def is_quantised(name):
    """Whether publishers keep a parameter in fewer bits."""
    return name.endswith(".weight") and any(q in name for q in QUANTISED) and "norm" not in name


def save(state, path, metadata=None):
    """A safetensors file."""
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path


def fp8_scaled(state, style="comfy", dtype=torch.float8_e4m3fn):
    """A state with its block matrices in 8 bits and their scales, and what it then stands for.

    style: "comfy" (scale_weight, scale_input, scaled_fp8), "comfy_quant" (weight_scale and notes),
    "metadata" (notes in the header), "rows" (LightX2V's scale a row), "blocks" (weight_scale_inv).
    """
    out, exact, header = {}, {}, {}
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    for name, value in state.items():
        if not is_quantised(name):
            out[name] = exact[name] = value
            continue
        layer = name.removesuffix(".weight")
        if style == "rows":
            scale = value.abs().amax(1, keepdim=True) / limit
        elif style == "blocks":
            wide = torch.nn.functional.pad(
                value, (0, -value.shape[1] % 128, 0, -value.shape[0] % 128)
            )
            scale = wide.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3)) / limit
        else:
            scale = value.abs().max() / limit
        spread = scale
        if style == "blocks":
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            spread = spread[: value.shape[0], : value.shape[1]]
        small = value / spread
        small = small.round().to(dtype) if dtype == torch.int8 else small.to(dtype)
        out[name], exact[name] = small, small.float() * spread
        key = {"comfy": "scale_weight", "blocks": "weight_scale_inv"}.get(style, "weight_scale")
        out[f"{layer}.{key}"] = scale.float()
        if style == "comfy":
            out[f"{layer}.scale_input"] = torch.ones(())
        kind = {"format": str(dtype).removeprefix("torch.")}
        if style == "comfy_quant":
            out[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps(kind).encode()), dtype=torch.uint8
            )
        header[layer] = kind
    if style == "comfy":
        out["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": header})}
    return out, exact, metadata if style == "metadata" else None


def gguf_blocks(kind, rows, columns, rng):
    """Bytes [rows, n] of a GGUF type whose scales are small numbers."""
    from nexus_rt.models.encodings import GGUF_BLOCKS

    block = GGUF_BLOCKS[kind]
    raw = rng.integers(0, 256, (rows * columns // block.values, block.size), dtype=np.uint8)
    halves = {
        "Q8_0": (0,),
        "Q4_0": (0,),
        "Q5_0": (0,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
    }[kind]
    for at in halves:
        small = rng.normal(0, 2e-5 if kind[-1] == "K" else 2e-3, (len(raw), 1))
        raw[:, at : at + 2] = small.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def save_gguf(state, path, kinds, arch="wan", seed=0, quantised=is_quantised):
    """A GGUF file as city96's converter writes it, and the float32 state that it stands for.

    kinds: types that the quantised matrices take in turn; the rest is F32, biases and norms as they
    are.
    """
    import gguf

    rng, writer, exact, turn = np.random.default_rng(seed), gguf.GGUFWriter(path, arch), {}, 0
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in state.items():
        if not quantised(name):
            writer.add_tensor(name, value.float().numpy())
            exact[name] = value.float()
            continue
        kind = kinds[turn % len(kinds)]
        turn += 1
        if kind in ("F16", "BF16"):
            small = value.half() if kind == "F16" else value.bfloat16()
            data = small.numpy() if kind == "F16" else small.view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
            exact[name] = small.float()
            continue
        raw = gguf_blocks(kind, *value.shape, rng)
        type_ = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(name, raw, raw_dtype=type_)
        exact[name] = torch.from_numpy(gguf.quants.dequantize(raw, type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def t5_state(pair):
    """The tiny pair's text encoder, in Wan's own names."""
    from safetensors.torch import load_file

    return original_t5_names(load_file(pair / "text_encoder" / "model.safetensors"))


def llama_names(state):
    """A UMT5 encoder in Wan's own names -> llama.cpp's, as GGUF files have them."""
    out = {}
    for name, value in state.items():
        for ours, theirs in (
            ("token_embedding.", "token_embd."),
            ("pos_embedding.embedding.", "attn_rel_b."),
            ("norm1.", "attn_norm."),
            ("norm2.", "ffn_norm."),
            ("attn.q.", "attn_q."),
            ("attn.k.", "attn_k."),
            ("attn.v.", "attn_v."),
            ("attn.o.", "attn_o."),
            ("ffn.gate.0.", "ffn_gate."),
            ("ffn.fc1.", "ffn_up."),
            ("ffn.fc2.", "ffn_down."),
        ):
            name = name.replace(ours, theirs)
        name = name.replace("blocks.", "enc.blk.")
        out["enc.output_norm.weight" if name == "norm.weight" else name] = value
    return out


def vae_model():
    """diffusers' VAE of Wan 2.1's kind: two residual blocks a level, the published statistics."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(5)
    return AutoencoderKLWan(base_dim=4, z_dim=16).eval()


def vae_state():
    """The same in Wan's own names."""
    return {k: v.clone() for k, v in original_vae_names(vae_model().state_dict()).items()}
