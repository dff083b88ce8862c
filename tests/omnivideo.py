"""A folder laid out as the OmniVideo checkpoints are published, at tiny dimensions, and what it
must become."""

import json
import pickle

import torch
from safetensors.torch import save_file

TEXT, LLM, VISION = 32, 40, 16
WAN = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    ffn_dim=48,
    text_dim=TEXT,
    freq_dim=32,
)
LLAMA3 = (
    "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|> [GEN_VID]"
    " [GEN_IMG]".split()
)
WORDS = "You are a Generate video image about the panda red circle moves left user system assistant".split()


def original_wan_names(state):
    """diffusers' Wan transformer -> Wan's own names."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
            ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
            ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
            ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
            ("condition_embedder.time_proj.", "time_projection.1."),
            ("proj_out.", "head.head."),
            (".attn1.", ".self_attn."),
            (".attn2.", ".cross_attn."),
            (".to_q.", ".q."),
            (".to_k.", ".k."),
            (".to_v.", ".v."),
            (".to_out.0.", ".o."),
            (".ffn.net.0.proj.", ".ffn.0."),
            (".ffn.net.2.", ".ffn.2."),
            (".norm2.", ".norm3."),
        ):
            name = name.replace(ours, theirs)
        name = (
            "head.modulation"
            if name == "scale_shift_table"
            else name.replace("scale_shift_table", "modulation")
        )
        out[name] = tensor
    return out


def original_t5_names(state):
    """transformers' UMT5 encoder -> Wan's own names."""
    out = {}
    for name, tensor in state.items():
        if name == "encoder.embed_tokens.weight":
            continue
        name = name.replace("shared.", "token_embedding.").replace(
            "encoder.final_layer_norm.", "norm."
        )
        name = name.replace("encoder.block.", "blocks.").replace(".layer.0.layer_norm.", ".norm1.")
        name = name.replace(".layer.1.layer_norm.", ".norm2.")
        name = name.replace(
            ".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."
        )
        name = name.replace(".layer.0.SelfAttention.", ".attn.")
        for ours, theirs in (("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2")):
            name = name.replace(f".layer.1.DenseReluDense.{ours}.", f".ffn.{theirs}.")
        out[name] = tensor
    return out


def original_vae_names(state):
    """diffusers' AutoencoderKLWan (two residual blocks a level) -> Wan's own names."""
    inner = (
        ("norm1.", "residual.0."),
        ("conv1.", "residual.2."),
        ("norm2.", "residual.3."),
        ("conv2.", "residual.6."),
    )
    out = {}
    for name, tensor in state.items():
        side = name.split(".")[0]
        if name.startswith(("quant_conv.", "post_quant_conv.")):
            out[name.replace("post_quant_conv.", "conv2.").replace("quant_conv.", "conv1.")] = (
                tensor
            )
            continue
        rest = name.removeprefix(side + ".")
        if rest.startswith("conv_in."):
            rest = rest.replace("conv_in.", "conv1.")
        elif rest.startswith("norm_out."):
            rest = rest.replace("norm_out.", "head.0.")
        elif rest.startswith("conv_out."):
            rest = rest.replace("conv_out.", "head.2.")
        elif rest.startswith("mid_block.attentions.0."):
            rest = rest.replace("mid_block.attentions.0.", "middle.1.")
        elif rest.startswith("mid_block.resnets."):
            index, leaf = rest.removeprefix("mid_block.resnets.").split(".", 1)
            for ours, theirs in inner:
                leaf = leaf.replace(ours, theirs)
            rest = f"middle.{2 * int(index)}.{leaf}"
        elif rest.startswith("down_blocks."):
            for ours, theirs in (*inner, ("conv_shortcut.", "shortcut.")):
                rest = rest.replace(ours, theirs)
            rest = rest.replace("down_blocks.", "downsamples.")
        elif rest.startswith("up_blocks."):
            level, kind, index, leaf = rest.removeprefix("up_blocks.").split(".", 3)
            at = 4 * int(level) + (3 if kind == "upsamplers" else int(index))
            for ours, theirs in (*inner, ("conv_shortcut.", "shortcut.")):
                leaf = leaf.replace(ours, theirs)
            rest = f"upsamples.{at}.{leaf}"
        out[f"{side}.{rest}"] = tensor
    return out


def make_llm(folder, hidden=LLM, words=(*LLAMA3, *WORDS)):
    """A tiny Llama with a tokenizer that has the chat format's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [w for w in words if w[0] in "<["]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=special
    ).save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_published(root, pair, zipped_context=False):
    """Write the published layout under `root`; returns the state dicts its parts must end up with.

    Args:
        pair: a tiny pair's folder, whose text encoder and tokenizer take the place of UMT5-XXL's.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    from nexus_rt.models.connector import SPECIAL_TOKENS, Connector, ConnectorConfig

    torch.manual_seed(21)
    wan = root / "wan" / "wanxiang1_3b"
    for folder in (
        "adapter",
        "vision_head/vision_head",
        "transformer",
        "unconditioned_context",
        "special_tokens",
        "ar_model/checkpoint",
    ):
        (root / folder).mkdir(parents=True)
    wan.mkdir(parents=True)

    base = WanTransformer3DModel(**WAN).state_dict()
    dim = WAN["num_attention_heads"] * WAN["attention_head_dim"]
    save_file(
        {k: v.contiguous() for k, v in original_wan_names(base).items()},
        wan / "diffusion_pytorch_model.safetensors",
    )
    config = dict(
        _class_name="WanModel",
        model_type="t2v",
        dim=dim,
        num_heads=2,
        num_layers=1,
        ffn_dim=48,
        freq_dim=32,
        in_dim=16,
        out_dim=16,
        text_len=512,
        eps=1e-6,
        text_dim=TEXT,
    )
    (wan / "config.json").write_text(json.dumps(config))

    connector = Connector(
        ConnectorConfig(
            llm_hidden_size=LLM, vision_dim=VISION, text_dim=TEXT, adapter_queries=6, num_layers=2
        )
    )
    for p in connector.parameters():
        torch.nn.init.normal_(p, std=0.2)
    parts = connector.state_dict()
    own = lambda name: {
        k.removeprefix(name + "."): v for k, v in parts.items() if k.startswith(name + ".")
    }
    head, adapter = own("vision_head"), own("adapter")
    torch.save(head, root / "vision_head" / "vision_head" / "pytorch_model.bin")
    torch.save(
        {
            "model_state_dict": {f"module.{k}": v for k, v in adapter.items()},
            "epoch": 3,
            "step": 900,
        },
        root / "adapter" / "model.pt",
    )

    # the mixed model: the whole Wan tuned, the vision head too, the adapter but for one tensor; and
    # what is not needed
    tuned = {k: v + 0.5 for k, v in base.items()}
    tuned_head = {k: v + 0.25 for k, v in head.items()}
    tuned_adapter = {k: v - 0.25 for k, v in adapter.items() if k != "fc.0.bias"}
    mixed = {f"wan_model.{k}": v for k, v in original_wan_names(tuned).items()}
    mixed |= {f"ar_vision_head.{k}": v for k, v in tuned_head.items()} | {
        f"adapter.{k}": v for k, v in tuned_adapter.items()
    }
    mixed |= {
        "visual_context_adapter.proj.weight": torch.ones(2, 2),
        "wan_model.img_emb.proj.0.weight": torch.ones(3),
    }
    torch.save({"module": mixed}, root / "transformer" / "model.pt")

    encoder = UMT5EncoderModel.from_pretrained(pair / "text_encoder")
    torch.save(original_t5_names(encoder.state_dict()), wan / "models_t5_umt5-xxl-enc-bf16.pth")
    (wan / "google").mkdir()
    (wan / "google" / "umt5-xxl").symlink_to(pair / "tokenizer")
    vae = AutoencoderKLWan(base_dim=4, z_dim=16).state_dict()
    torch.save(original_vae_names(vae), wan / "Wan2.1_VAE.pth")
    make_llm(root / "ar_model" / "checkpoint" / "llm")

    context = {
        "text_emb": torch.randn(1, 5, TEXT),
        "vlm_last_hidden_states": torch.randn(1, 9, LLM),
        "prompt": "",
    }
    tokens = {name: torch.randn(1, TEXT) for name in SPECIAL_TOKENS} | {
        "<vid_st>": torch.randn(1, TEXT)
    }
    for value, path in (
        (context, root / "unconditioned_context" / "context.pkl"),
        (tokens, root / "special_tokens" / "tokens.pkl"),
    ):
        if zipped_context:
            torch.save(value, path)
        else:
            with path.open("wb") as file:
                pickle.dump(value, file)
    merged = {f"vision_head.{k}": v for k, v in tuned_head.items()} | {
        f"adapter.{k}": v for k, v in adapter.items()
    }
    merged |= {f"adapter.{k}": v for k, v in tuned_adapter.items()}
    return {
        "small": tuned,
        "connector": merged,
        "vae": vae,
        "context": context,
        "tokens": tokens,
        "encoder": encoder,
    }
