"""Old names of modules: each still imports, is the module under its new name, and warns."""

import importlib
import pickle
import subprocess
import sys

import pytest

from nexus_rt.renamed import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_under_its_new_one(old):
    new = importlib.import_module(f"nexus_rt.{MOVED[old]}")
    spec = new.__spec__
    sys.modules.pop(f"nexus_rt.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"nexus_rt\.{old} is now nexus_rt\.{MOVED[old]}"):
        assert importlib.import_module(f"nexus_rt.{old}") is new
    assert new.__spec__ is spec and new.__name__ == f"nexus_rt.{MOVED[old]}"


def test_from_a_package_and_through_pickle():
    code = (
        "import pickle, warnings; warnings.simplefilter('ignore')\n"
        "from nexus_rt.engines import residency\n"
        "from nexus_rt.models.lora import Lora\n"
        "from nexus_rt.loading.lora import Lora as new\n"
        "assert Lora is new and pickle.loads(pickle.dumps(Lora)) is new\n"
        "assert residency.__name__ == 'nexus_rt.memory.residency'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert pickle.loads(pickle.dumps(importlib.import_module("nexus_rt.plan").Plan))


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nexus_rt.models.nothing")


def test_noise_in_the_old_order_of_arguments(tiny_pipe):
    import torch

    from nexus_rt.size import ClipSize

    seeded = lambda: torch.Generator().manual_seed(1)
    new = tiny_pipe.prepare_latents(2, ClipSize(48, 32, 5), seeded())
    with pytest.warns(DeprecationWarning, match="a ClipSize"):
        assert torch.equal(tiny_pipe.prepare_latents(2, 5, 32, 48, seeded()), new)
