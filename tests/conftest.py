"""A tiny random pair in diffusers' layout, made once: everything but the quality of its pictures is
real."""

import json
import os
import shutil

import pytest
import torch

from tests.interpreter import NO_LOOPS, met

# before any kernel is decorated: they run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TRANSFORMERS = {
    "small": dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=48),
    "large": dict(num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96),
}
SIZES = ("32x32x5", "48x32x5")  # of the tiny pair's engines
# Files whose tests share engines, which one process of several builds; and groups that take long,
# which begin first.
SHARED = ("test_engines.py", "test_examples.py", "test_export.py", "test_swap.py")
LONG = (
    "test_engines.py",
    "test_gpu_suite.py",
    "test_tensorrt.py",
    "test_batch_ray.py",
    "test_aot.py",
    "test_process.py",
)
WORDS = "a the red blue circle square moves left right on black background panda".split()


def group(name):
    """What one process of `pytest -n 2 --dist loadfile` runs: a file, or the files that share
    engines."""
    return SHARED[0] if name in SHARED else name


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(group(item.path.name), len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A kernel that this Triton cannot interpret is no fault of the kernel's."""
    try:
        return (yield)
    except Exception as error:
        if NO_LOOPS and met(error):
            pytest.skip(NO_LOOPS)
        raise


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid.split("::")[0].rpartition("/")[2])

    config.option.loadscopereorder = False  # the order of above
    return Groups(config, log) if config.getvalue("dist") == "loadfile" else None


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
    AutoencoderKLWan(
        base_dim=4, z_dim=16, num_res_blocks=1, latents_mean=mean, latents_std=std
    ).save_pretrained(root / "vae")
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(root / "tokenizer")
    UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocab),
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    ).save_pretrained(root / "text_encoder")
    index = {
        "_class_name": "NexusPipeline",
        "defaults": {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 6},
    }
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


@pytest.fixture(scope="session")
def engines_cache(tmp_path_factory):
    """What NEXUS_RT_CACHE is set to where engines of the tiny pair are wanted and not their
    building."""
    return tmp_path_factory.mktemp("engines") / "cache"


@pytest.fixture(scope="session")
def tiny_engines(tiny_pair, engines_cache):
    """The output folder of `nexus-rt export`: every part of the tiny pair, for ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    from nexus_rt.cli import main

    out = engines_cache.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXUS_RT_CACHE", str(engines_cache))
        line = ["export", "--pair", str(tiny_pair), "--parts", "small,large,vae,text_encoder"]
        assert main([*line, "--sizes", ",".join(SIZES), "-o", str(out)]) == 0
    return out
