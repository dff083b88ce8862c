"""A tiny random pair in diffusers' layout, made once: everything but the quality of its pictures is real."""

import json
import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is decorated: they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

TRANSFORMERS = {
    "small": dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=48),
    "large": dict(num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96),
}
WORDS = "a the red blue circle square moves left right on black background panda".split()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """A pair folder: small/, large/, vae/, text_encoder/, tokenizer/, model_index.json."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(11)
    for name, config in TRANSFORMERS.items():
        WanTransformer3DModel(text_dim=32, freq_dim=32, **config).save_pretrained(root / name)
    mean, std = torch.linspace(-0.4, 0.4, 16).tolist(), torch.linspace(0.6, 1.4, 16).tolist()
    AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1, latents_mean=mean, latents_std=std).save_pretrained(root / "vae")
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        root / "tokenizer"
    )
    UMT5EncoderModel(
        UMT5Config(vocab_size=len(vocab), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)
    ).save_pretrained(root / "text_encoder")
    index = {"_class_name": "NexusPipeline", "defaults": {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 6}}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def own_pair(tiny_pair, tmp_path):
    """A copy of the tiny pair that a test may damage."""
    return shutil.copytree(tiny_pair, tmp_path / "pair")


@pytest.fixture(scope="session")
def tiny_pipe(tiny_pair):
    from nexus_rt import NexusPipeline

    pipe = NexusPipeline.from_pretrained(tiny_pair)
    pipe.set_progress_bar_config(disable=True)
    return pipe
