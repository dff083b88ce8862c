"""Sizes that are refused come with sizes that are not; noise belongs to its generator."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt import InputError
from nexus_rt.core.size import ClipSize
from nexus_rt.method.latents import LatentGrid, random_latents
from tests.refusals import refuses

WAN = LatentGrid(8, 4, (1, 2, 2))


def test_wans_grid():
    assert WAN.latent(ClipSize(832, 480, 81)) == (21, 60, 104) and WAN.latent(
        ClipSize(16, 16, 1)
    ) == (1, 2, 2)


@settings(deadline=None)
@given(st.integers(-40, 2000), st.integers(-40, 2000), st.integers(-5, 200))
def test_what_the_message_offers_is_accepted(height, width, frames):
    values = {"num_frames": frames, "height": height, "width": width}
    for _ in range(4):
        try:
            WAN.check(ClipSize(values["width"], values["height"], values["num_frames"]))
            break
        except InputError as error:
            name, offers = (
                error.param,
                re.findall(r"\d+", str(error).split("such as")[1]),
            )
            assert all(abs(int(o) - values[name]) <= abs(values[name]) + 16 for o in offers)
            values[name] = int(offers[0])
    else:
        pytest.fail(f"no offer was accepted: {values}")
    good = (
        height >= 16
        and height % 16 == 0
        and width >= 16
        and width % 16 == 0
        and frames >= 1
        and frames % 4 == 1
    )
    assert (values == {"num_frames": frames, "height": height, "width": width}) == good


def test_noise_is_its_generators():
    seed = lambda s: torch.Generator().manual_seed(s)
    both = random_latents((2, 16, 1, 2, 3), [seed(1), seed(2)], torch.device("cpu"))
    assert (
        torch.equal(both[:1], random_latents((1, 16, 1, 2, 3), seed(1), torch.device("cpu")))
        and both.dtype == torch.float32
    )
    assert not torch.equal(both[0], both[1])
    with refuses("mismatch", "generator", InputError):
        random_latents((2, 16, 1, 2, 3), [seed(1)], torch.device("cpu"))
