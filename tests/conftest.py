"""A tiny random pair in diffusers' layout, made once: everything but the quality of its pictures is
real."""

import json
import logging
import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: a worker has one core

import pytest
import torch

from tests import built
from tests.needs import needs

# before any kernel is decorated: they run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TRANSFORMERS = {
    "small": dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=48),
    "large": dict(num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96),
}
UNFINISHED = shutil.ignore_patterns("*.part", "*.lock", "hashes")  # of an engine cache
SIZES = ("32x32x5", "48x32x5")  # of the tiny pair's engines
# The marks of pyproject.toml that the default run leaves out: their tests take longest and begin
# first.
GROUPS = ("toolchain", "export", "ray", "process", "packaging", "browser")
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
WORDS = "a the red blue circle square moves left right on black background panda".split()


def pytest_xdist_auto_num_workers():
    """Three workers on two cores: a third of the tests' time is spent in waits."""
    return min(max((os.cpu_count() or 1) * 3 // 2, 1), 8)


def pytest_collection_modifyitems(items):
    """Files with tests of `GROUPS` begin first: one worker runs a whole file."""
    order = {name: place for place, name in enumerate(GROUPS)}
    first = {}
    for item in items:
        places = [order[m.name] for m in item.iter_markers() if m.name in order]
        first[item.path] = min(first.get(item.path, len(order)), *places, len(order))
    items.sort(key=lambda item: first[item.path])


@pytest.fixture(autouse=True)
def logger_as_before():
    """The command line gives the package's logger a level and a handler for as long as it runs."""
    logger = logging.getLogger("nexus_rt")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def make_pair(root):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

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


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """A pair folder: small/, large/, vae/, text_encoder/, tokenizer/, model_index.json."""
    made = built.once("pair", make_pair)
    ignore = shutil.ignore_patterns(built.COMPLETE)
    return shutil.copytree(made, tmp_path_factory.mktemp("tiny") / "pair", ignore=ignore)


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
def mini_pipe():
    """The packaged pair. Tests leave it as it is."""
    from nexus_rt import NexusPipeline

    pipe = NexusPipeline.from_pretrained(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def engines_cache():
    """`NEXUS_RT_CACHE` where engines of the tiny pair are wanted and not their building. Tests
    export from it into no folder of their own: the engine would move there."""
    path = built.folder() / "cache"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture
def own_cache(engines_cache, tmp_path, monkeypatch):
    """`NEXUS_RT_CACHE` of one test, with a copy of what `engines_cache` holds now."""
    copy = shutil.copytree(engines_cache, tmp_path / "cache", ignore=UNFINISHED)
    monkeypatch.setenv("NEXUS_RT_CACHE", str(copy))
    return copy


@pytest.fixture(scope="session")
def tiny_engines(tiny_pair, engines_cache):
    """The output folder of `nexus-rt export`: every part of the tiny pair, for ONNX Runtime."""
    needs("onnx", "onnxscript", "onnxruntime")
    from nexus_rt.cli import main

    def export(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NEXUS_RT_CACHE", str(engines_cache))
            line = ["export", "--pair", str(tiny_pair), "--parts", "small,large,vae,text_encoder"]
            assert main([*line, "--sizes", ",".join(SIZES), "-o", str(out)]) == 0

    return built.once("engines", export)


@pytest.fixture(scope="session")
def small_aoti(tiny_pair, engines_cache):
    """The small tiny generator, built by AOTInductor in `engines_cache`."""
    needs("onnx", "onnxscript", "onnxruntime")
    from nexus_rt.core.size import ClipSize
    from nexus_rt.export.build import Target, export_component
    from nexus_rt.export.components import GeneratorComponent

    target = Target("aoti", "fp32", tuple(map(ClipSize.parse, SIZES)), torch.device("cpu"))
    part = GeneratorComponent("small", tiny_pair / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXUS_RT_CACHE", str(engines_cache))
        return export_component(part, target, "nexus-rt export")


@pytest.fixture(scope="session")
def ray_of_session():
    needs("ray")
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_SETTINGS.items():
            patch.setenv(name, value)
        yield ray
        ray.shutdown()


@pytest.fixture
def local_ray(ray_of_session):
    """A Ray of two processors: one for all tests, unless a test before ended it."""
    if not ray_of_session.is_initialized():
        ray_of_session.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
