"""What a CUDA graph demands of its caller, on a CPU: fixed addresses in, one result out, a graph a
shape."""

import pytest
import torch

from nexus_rt import InputError, NexusPipeline
from nexus_rt.engines import cuda_graphs
from nexus_rt.engines.cuda_graphs import ReplayedEngine
from nexus_rt.engines.exported_engine import EngineContext
from nexus_rt.engines.torch import TorchEngine


class Recorder:
    """Stands for CUDA's capture: a replay runs the recorded call on the tensors it was recorded
    with."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, call, device):
        self.recorded += 1
        result = call().clone()

        def replay():
            self.replayed += 1
            result.copy_(call())

        result.fill_(float("nan"))  # nothing of the recording itself may be used
        return replay, result


@pytest.fixture
def engines(tiny_pipe):
    model = tiny_pipe.engines["large"].model
    recorder = Recorder()
    return TorchEngine(model), ReplayedEngine(TorchEngine(model), recorder), recorder


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_replays_are_the_engine(engines):
    engine, replayed, recorder = engines
    for words, batch, seed in ((5, 1, 1), (9, 1, 2), (5, 2, 3), (5, 1, 4)):
        embeds = torch.zeros(2 * batch, 20, 32)
        embeds[:, :words] = noise(2 * batch, words, 32, seed=seed)
        mine, theirs = replayed.prepare(embeds), engine.prepare(embeds)
        kept = []
        for timestep in (990.0, 400.0):
            x = noise(batch, 16, 2, 4, 6, seed=int(timestep) + seed)
            kept.append(
                (
                    replayed.velocity(x, torch.tensor(timestep), mine),
                    engine.velocity(x, torch.tensor(timestep), theirs),
                )
            )
        # a velocity outlives the next replay
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in kept)
    # prompts of 5 and 9 words share a graph; two samples have their own
    assert (recorder.recorded, recorder.replayed) == (
        2,
        8,
    )
    assert replayed.nbytes == engine.nbytes


def test_weights_that_moved_are_recorded_again(engines):
    _, replayed, recorder = engines
    context, x = replayed.prepare(noise(2, 5, 32)), noise(1, 16, 1, 4, 4)
    first = replayed.velocity(x, torch.tensor(9.0), context)
    replayed.unload()
    assert (
        torch.equal(replayed.velocity(x, torch.tensor(9.0), context), first)
        and recorder.recorded == 2
    )


def test_graphs_do_not_pile_up(engines):
    _, replayed, recorder = engines
    context = replayed.prepare(noise(2, 5, 32))
    for frames in (1, 2, 3, 4, 5, 5, 2, 1):
        replayed.velocity(noise(1, 16, frames, 4, 4), torch.tensor(9.0), context)
    # the oldest, one frame, was given up
    assert recorder.recorded == 6 and len(replayed.graphs) == cuda_graphs.KEPT


def test_streamed_weights_are_not_recorded(engines):
    _, replayed, recorder = engines
    replayed.load(streamed=True)
    context = replayed.prepare(noise(2, 5, 32))
    assert torch.isfinite(
        replayed.velocity(noise(1, 16, 1, 4, 4), torch.tensor(9.0), context)
    ).all()
    assert recorder.recorded == 0
    replayed.unload()


def test_padding_counts_for_nothing():
    context = EngineContext(noise(3, 2, 70, 4, 8), noise(3, 2, 70, 4, 8), torch.zeros(2, 70))
    long = cuda_graphs.padded(context)
    assert long.keys.shape == (3, 2, 128, 4, 8) and torch.equal(
        long.values[:, :, :70], context.values
    )
    assert (long.bias[:, 70:] == float("-inf")).all() and cuda_graphs.padded(long) is long


def test_where_nothing_can_be_recorded_it_is_said(tiny_pair):
    with pytest.raises(
        InputError,
        match="CUDA graphs cannot be recorded here: they are of a CUDA device, .* runs on cpu",
    ):
        NexusPipeline.from_pretrained(tiny_pair, cuda_graphs=True, device="cpu")
