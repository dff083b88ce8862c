"""What a CUDA graph demands of its caller, on a CPU: fixed addresses in, one result out, a graph a
shape."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nexus_rt import InputError, NexusPipeline
from nexus_rt.core.devices import held_by_recording, hold, recording
from nexus_rt.engines import cuda_graphs
from nexus_rt.engines.cuda_graphs import ReplayedEngine
from nexus_rt.engines.exported_engine import EngineContext
from nexus_rt.engines.tensorrt import TensorRTSessions
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.ops import block_ops
from tests.refusals import refuses


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
    with refuses("unsupported", "cuda_graphs", InputError):
        NexusPipeline.from_pretrained(tiny_pair, cuda_graphs=True, device="cpu")


class Reads(TorchDispatchMode):
    """Storages that operations read and none of them made."""

    def __init__(self):
        super().__init__()
        self.made, self.read = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for t in tree_flatten((args, kwargs or {}))[0]:
            if isinstance(t, torch.Tensor) and t.numel():
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.made:
                    self.read[storage.data_ptr()] = (str(function), tuple(t.shape))
        out = function(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.read:
                self.made[t.untyped_storage().data_ptr()] = t  # kept: an address is given once
        return out


def pieces(graph):
    """Every tensor that a recording keeps alive."""
    tables = [t for held in graph.held for t in (held if isinstance(held, tuple) else (held,))]
    return [graph.latents, graph.timestep, *cuda_graphs.tensors_of(graph.static), *tables]


@pytest.mark.parametrize("weights", ["dense", "int8", "int8-dynamic"])
@pytest.mark.parametrize("generator", ["small", "large"])
def test_a_graph_keeps_all_that_its_step_reads(tiny_pair, weights, generator):
    pipe = NexusPipeline.from_pretrained(tiny_pair, weights=weights, device="cpu")
    engine = pipe.engines[generator]
    reads = Reads()

    def record(call, device):
        call()
        with reads:
            result = call()
        return (lambda: None), result

    replayed = ReplayedEngine(engine, record)
    context = replayed.prepare(torch.zeros(2, 20, 32).index_fill_(1, torch.arange(5), 1.0))
    replayed.velocity(noise(1, 16, 2, 4, 6), torch.tensor(9.0), context)
    (graph,) = replayed.graphs.values()
    kept = {t.untyped_storage().data_ptr() for t in pieces(graph)}
    scalars = {p for p, (_, shape) in reads.read.items() if shape == ()}  # read by the host
    assert len(reads.read) > 20
    assert not {reads.read[p] for p in reads.read.keys() - kept - scalars}


def test_what_a_graph_reads_lives_as_long_as_it(tiny_pair):
    """Tables out of a cache, the context, weights that LoRAs or a move replaced."""
    pipe = NexusPipeline.from_pretrained(tiny_pair, device="cpu")
    replayed = ReplayedEngine(pipe.engines["large"], Recorder())
    x = noise(1, 16, 3, 4, 10)
    replayed.velocity(x, torch.tensor(9.0), replayed.prepare(noise(2, 7, 32)))
    (graph,) = replayed.graphs.values()
    watched = [weakref.ref(t) for t in pieces(graph)]
    tables = block_ops.rope_table(replayed.model.config.attention_head_dim, (3, 2, 5), x.device)
    watched += [weakref.ref(t) for t in tables]
    for parameter in replayed.model.parameters():
        parameter.data = torch.empty_like(parameter)  # as a move or a swap does
    for rows in range(20):  # more tables than the cache holds
        block_ops.rope_table(replayed.model.config.attention_head_dim, (1, rows + 1, 1), x.device)
    del tables, parameter
    gc.collect()
    assert all(w() is not None for w in watched)
    key = next(iter(replayed.graphs))
    for frames in range(4, 4 + cuda_graphs.KEPT):  # newer graphs take its place
        context = replayed.prepare(noise(2, 7, 32))
        replayed.velocity(noise(1, 16, frames, 4, 4), torch.tensor(9.0), context)
    assert key not in replayed.graphs
    del graph
    gc.collect()
    assert all(w() is None for w in watched)


@pytest.mark.parametrize("table", ["rope_table", "rope_pairs"])
def test_tables_of_more_sizes_than_a_cache_holds(table):
    held = []
    make = getattr(block_ops, table)
    with recording(held):
        first = [weakref.ref(t) for t in make(32, (3, 2, 2), torch.device("cpu"))]
        for side in range(3, 40):
            make(32, (1, 1, side), torch.device("cpu"))
            make(32, (3, 2, 2), torch.device("cpu"))
    for side in range(40, 80):
        make(32, (1, 1, side), torch.device("cpu"))
    gc.collect()
    assert all(t() is not None for t in first)
    assert len(held) == 1 + 37  # each once
    held.clear()
    gc.collect()
    assert all(t() is None for t in first)


def test_a_filter_is_held_too():
    from nexus_rt.method.blend_config import BlendConfig
    from nexus_rt.method.guidance import Prediction
    from nexus_rt.method.upfb import combine

    held = []
    v = noise(1, 2, 1, 6, 8)
    with recording(held):
        assert held_by_recording() is held
        combine(Prediction(v), Prediction(v + 1), 0.4, BlendConfig(split="dct"), "none")
    assert len(held) == 1 and held[0].left.shape[-1] == 6
    assert held_by_recording() is None and hold(v) is v and len(held) == 1


def test_a_step_of_a_new_size_is_the_call_that_warmed_its_graph_up(tiny_pipe):
    """Two calls and a recording, which computes nothing: the first call's velocity is the step's."""
    inner = TorchEngine(tiny_pipe.engines["large"].model)
    computed = []
    velocity = inner.velocity
    inner.velocity = lambda *args: computed.append(velocity(*args)) or computed[-1]
    replays = []

    def record(call, device):
        call()
        result = call()
        computed.pop()  # a recording
        return (lambda: replays.append(result.copy_(call()))), result

    replayed = ReplayedEngine(inner, record)
    context, x = replayed.prepare(noise(2, 5, 32)), noise(1, 16, 1, 4, 4)
    first = replayed.velocity(x, torch.tensor(9.0), context)
    assert torch.equal(first, velocity(x, torch.tensor(9.0), context))
    assert len(computed) == 1 and not replays
    for _ in range(3):
        assert torch.equal(replayed.velocity(x, torch.tensor(9.0), context), first)
    assert len(computed) == 4 and len(replays) == 3


def test_a_warm_up_records_the_graph_of_a_guided_step(tiny_pipe):
    recorder = Recorder()
    replayed = ReplayedEngine(TorchEngine(tiny_pipe.engines["large"].model), recorder)
    replayed.warmup((1, 4, 6))
    assert recorder.recorded == 1
    embeds = torch.zeros(2, 512, 32)
    embeds[:, :9] = noise(2, 9, 32)
    replayed.velocity(noise(1, 16, 1, 4, 6), torch.tensor(9.0), replayed.prepare(embeds))
    assert recorder.recorded == 1


def test_loras_that_were_changed_under_it_are_recorded_again(tiny_pipe):
    inner = TorchEngine(tiny_pipe.engines["large"].model)
    recorder = Recorder()
    replayed = ReplayedEngine(inner, recorder)
    context, x = replayed.prepare(noise(2, 5, 32)), noise(1, 16, 1, 4, 4)
    replayed.velocity(x, torch.tensor(9.0), context)
    inner.model.loaded_from.loras = ("another",)
    replayed.velocity(x, torch.tensor(9.0), context)
    inner.model.loaded_from.loras = ()
    assert recorder.recorded == 2


class Execution:
    """TensorRT's execution context, noting what it is set to and how often it ran."""

    def __init__(self):
        self.runs, self.profiles, self.shapes = 0, [], {}

    def set_device_memory(self, address, size):
        self.memory = address

    def set_optimization_profile_async(self, profile, stream):
        self.profiles.append(profile)
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        pass

    def execute_async_v3(self, stream):
        self.runs += 1
        return True


@pytest.fixture
def sessions(monkeypatch):
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    strategy = SimpleNamespace(USER_MANAGED=1)
    made = TensorRTSessions.__new__(TensorRTSessions)
    made.device, made.graphs, made.errors = torch.device("cpu"), {"velocity": []}, []
    made.trt = SimpleNamespace(ExecutionContextAllocationStrategy=strategy)
    made.folder = SimpleNamespace(path="x", manifest=SimpleNamespace(options={}))
    made.buckets = [(1, 4, 4), (2, 4, 4)]
    made.memory = torch.zeros(64, dtype=torch.uint8)
    engine = SimpleNamespace(create_execution_context=lambda strategy: Execution())
    made.engines = {"velocity": engine}
    made.contexts = {"velocity": made.new_context("velocity")}
    return made


def test_a_recorded_graph_has_execution_contexts_of_its_own(sessions):
    """The vendor's rule: an execution context belongs to one graph at most."""
    shared = sessions.contexts["velocity"].execution

    def run(frames):
        sessions.run("velocity", {"latents": torch.zeros(1, 16, frames, 4, 4)}, {})

    graphs = []
    for frames in (1, 2, 1):
        held = []
        with recording(held):  # a warm-up, then the recording
            run(frames)
            run(frames)
        (own,) = held
        assert own.execution.runs == 2 and own.execution.profiles == [frames - 1]
        graphs.append(held)
    assert shared.runs == 0 and len({id(g[0].execution) for g in graphs}) == 3
    run(2)
    run(1)
    assert shared.runs == 2 and shared.profiles == [1, 0]
    assert all(g[0].execution.runs == 2 for g in graphs)  # later runs change none of theirs
    memory = weakref.ref(sessions.memory)
    sessions.contexts, sessions.engines, sessions.memory = {}, {}, None
    assert memory() is graphs[0][0].memory  # a graph holds what its context computes in
