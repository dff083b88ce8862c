"""What crosses between host and GPU: nothing in the loop waits, and errors come at most two steps
late."""

import gc
import math
import sys
import threading
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nexus_rt import NumericsError
from nexus_rt.core import devices
from nexus_rt.core.devices import Readings, on_device, send
from nexus_rt.core.size import ClipSize
from nexus_rt.engines import cuda_graphs, onnx
from nexus_rt.engines.cuda_graphs import ReplayedEngine
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.memory.offload import Moved
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.engine import Changeable, Diagnosable, Reserving, Streamed, supports
from nexus_rt.method.finite_check import FiniteCheck
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import time_grid
from nexus_rt.pipeline.memory_use import call_parts
from nexus_rt.pipeline.residency import Residency, plan_residency
from tests.needs import needs
from tests.refusals import refuses

# what makes a host wait for a device, where the tensor is on one
WAITS = {
    "item",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
}
COPIES = {"tensor", "as_tensor", "asarray", "from_numpy", "scalar_tensor"}


class Waits(TorchFunctionMode):
    """Notes every call that would wait on a GPU, and every new tensor of host numbers."""

    def __init__(self):
        super().__init__()
        self.seen, self.on = [], False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if self.on and name in WAITS | COPIES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Later:
    """A number of a fake GPU, which is there when the GPU has come so far."""

    def __init__(self, number, step, gpu):
        self.number, self.step, self.gpu = number, step, gpu

    @property
    def ready(self):
        return self.gpu["done"] > self.step

    def value(self):
        if not self.ready:
            self.gpu["waited"].append(self.step)
            self.gpu["done"] = self.step + 1
        return self.number


class Flat:
    """An engine whose velocity is a number; NaN at one timestep."""

    resident = True

    def __init__(self, bad=()):
        self.bad, self.ran = bad, []

    def prepare(self, context):
        return context

    def velocity(self, latents, timestep, context):
        self.ran.append(timestep)
        n = context.shape[0] // latents.shape[0]
        return torch.full_like(latents, math.nan if len(self.ran) in self.bad else 0.1).repeat(
            n, 1, 1, 1, 1
        )


def prompts():
    return dict.fromkeys(("small", "large"), Prompt(torch.ones(1, 3, 4), torch.zeros(1, 3, 4)))


@pytest.mark.parametrize(
    "plan, options",
    [
        ("small:3 bridge:3 large:*", {}),
        ("reference", {"blend": BlendConfig(split="dct")}),
        ("reference", {"blend": BlendConfig(split="fft", lowpass="butterworth")}),
        ("small:3 large:*", {"solver": "lcm"}),
        ("small:3 large:*", {"solver": "euler", "guidance": Guidance.of(1.0)}),
    ],
)
def test_nothing_in_the_loop_waits_for_the_device(monkeypatch, plan, options):
    gpu = {"done": 10**6, "waited": []}
    fetched = []

    def start(self, number):
        fetched.append(number)
        return SimpleNamespace(ready=True, value=lambda: 0.0)

    monkeypatch.setattr(Readings, "start", start)
    watch = Waits()

    def on_step(step, latents):
        watch.on = 0 < step.index < 11  # tables of the first step are made once a size

    walk = lambda: sample(
        torch.randn(1, 4, 2, 8, 8),
        parse_plan(plan, time_grid(12)).walked_by(options.get("solver", "unipc")),
        {"small": Flat(), "large": Flat()},
        prompts(),
        kernels="torch",
        hooks=Hooks(on_step=on_step, noise_rng=torch.Generator()),
        **options,
    )
    walk()  # filters of every cutoff are made once
    with watch:
        walk()
    assert watch.seen == [] and len(fetched) >= 24 and gpu["waited"] == []


def test_the_watch_sees_what_waits():
    """The check above can fail."""
    x = torch.ones(2)
    with Waits() as watch:
        watch.on = True
        float(x[0]), x.tolist(), bool(x[0] > 0), x[0].item(), torch.tensor(3.0)
    assert watch.seen == ["__float__", "tolist", "__bool__", "item", "tensor"]


def test_timesteps_are_one_tensor_a_call():
    engines = {"small": Flat(), "large": Flat()}
    plan = parse_plan("small:3 bridge:3 large:*", time_grid(12))
    sample(torch.randn(1, 4, 1, 4, 4), plan, engines, prompts(), kernels="torch")
    ran = engines["small"].ran + engines["large"].ran
    assert len({t.untyped_storage().data_ptr() for t in ran}) == 1
    assert [float(t) for t in engines["large"].ran] == [s.timestep for s in plan.steps if s.large]
    assert all(t.ndim == 0 and t.dtype == torch.float32 for t in ran)


@pytest.mark.parametrize("behind", [0, 1, 2, 5])
def test_what_is_not_finite_is_raised_at_most_two_steps_late(monkeypatch, behind):
    """On a device that is `behind` steps; one that is farther behind is waited for."""
    gpu, now = {"done": 0, "waited": []}, {"step": -1}

    def start(self, number):
        return Later(float(number), now["step"] + 1, gpu)

    def on_step(step, latents):
        now["step"] = step.index
        gpu["done"] = max(gpu["done"], step.index + 1 - behind)

    monkeypatch.setattr(Readings, "start", start)
    plan = parse_plan("small:*", time_grid(12))
    with refuses("not_finite", kind=NumericsError) as caught:
        sample(
            torch.randn(1, 4, 1, 4, 4),
            plan,
            {"small": Flat(bad={4})},
            prompts(),
            Guidance.of(1.0),
            kernels="torch",
            hooks=Hooks(on_step=on_step),
        )
    assert "small" in str(caught.value) and "step 3" in str(caught.value)
    # raised before the callback of a later step
    assert now["step"] <= 3 + 2 - 1 and (not gpu["waited"] or behind > 1)


def test_the_last_step_is_checked_too(monkeypatch):
    monkeypatch.setattr(
        Readings, "start", lambda self, n: Later(float(n), 10**6, {"done": 0, "waited": []})
    )
    plan = parse_plan("small:*", time_grid(4))
    with refuses("not_finite", kind=NumericsError) as caught:
        sample(
            torch.randn(1, 4, 1, 4, 4),
            plan,
            {"small": Flat(bad={4})},
            prompts(),
            Guidance.of(1.0),
            kernels="torch",
        )
    assert "step 3" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_a_gpu():
    device = torch.device("cuda")
    to = lambda prompt: Prompt(prompt.conditional.to(device), prompt.unconditional.to(device))

    def on_step(step, latents):
        torch.cuda.set_sync_debug_mode("error" if 0 < step.index < 10 else "default")

    try:
        for _ in range(2):
            sample(
                torch.randn(1, 4, 2, 8, 8, device=device),
                parse_plan("small:3 bridge:3 large:*", time_grid(12)),
                {"small": Flat(), "large": Flat()},
                {name: to(prompt) for name, prompt in prompts().items()},
                hooks=Hooks(on_step=on_step),
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Event:
    """Stands for CUDA's: done when it is told so."""

    made: ClassVar[list] = []

    def __init__(self, **options):
        self.done, self.waited = False, 0
        Event.made.append(self)

    def record(self, stream=None):
        self.stream = stream

    def query(self):
        return self.done

    def synchronize(self):
        self.waited += 1
        self.done = True


class OnGpu:
    """A number of a GPU, of which only its copy is asked."""

    is_cuda, device = True, torch.device("cuda:1")

    def __init__(self, number):
        self.number = number

    def reshape(self, shape):
        return torch.tensor(self.number)


@pytest.fixture
def gpu(monkeypatch):
    Event.made = []
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))


def test_a_reading_waits_only_when_it_is_asked_for_its_value(gpu):
    readings = Readings()
    first, second = readings.start(OnGpu(2.0)), readings.start(OnGpu(3.0))
    assert not first.ready and Event.made[0].waited == 0
    assert Event.made[0].stream == "stream of cuda:1"
    Event.made[0].done = True
    assert first.ready and first.value() == 2.0 and second.value() == 3.0
    assert [e.waited for e in Event.made] == [1, 1]


def test_a_place_is_used_again_when_it_has_been_read(gpu):
    readings = Readings()
    made = [readings.start(OnGpu(float(i))) for i in range(devices.PLACES)]
    values = [r.value() for r in made]
    more = readings.start(OnGpu(99.0))
    assert values == [float(i) for i in range(devices.PLACES)] and more.value() == 99.0
    assert more.host.data_ptr() == made[0].host.data_ptr()


def test_a_check_does_not_wait_before_it_must(gpu):
    watch = FiniteCheck({"small": None})
    step = lambda i: SimpleNamespace(index=i, timestep=9)
    for i in range(3):
        watch.sums.append((watch.readings.start(OnGpu(1.0)), "small", step(i)))
        watch.raise_if_bad(before=i + 1)
    assert sum(e.waited for e in Event.made) == 1 and len(watch.sums) == 2  # step 0, two steps late
    watch.wait()
    assert not watch.sums


def test_host_tensors_go_to_a_gpu_from_pinned_memory(monkeypatch):
    asked = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            asked.append((str(device), non_blocking))

    send(Host(), torch.device("cuda:1"))
    assert asked == ["pinned", ("cuda:1", True)]
    x = torch.ones(2)
    assert send(x, torch.device("cpu")) is x


def test_a_device_is_current_only_where_it_is_not_already(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda d: entered.append(d) or on_device(torch.device("cpu"))
    )
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        with on_device(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_where_a_model_is_is_asked_of_one_tensor(tiny_pipe):
    """A 14B has a thousand, and every step asks."""
    asked = []

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(50))

        def named_parameters(self, *args, **kwargs):
            for item in super().named_parameters(*args, **kwargs):
                asked.append(item[0])
                yield item

    assert Moved(Counted(), torch.device("cpu")).resident and len(asked) == 1
    assert Moved(torch.nn.Identity(), torch.device("cpu")).resident  # nothing to move


def test_places_are_reserved_by_the_thread_that_computes(monkeypatch, tiny_pipe):
    """An engine that arrives while another's steps may be recorded allocates nothing in its own
    thread."""
    where, main = {}, threading.get_ident()

    class Arriving:
        device, nbytes, host_bytes = torch.device("cpu"), 10, 0

        def __init__(self, name, there):
            self.name, self.resident = name, there
            self.model = tiny_pipe.engines["small"].model

        def reserve(self):
            where["reserved", self.name] = threading.get_ident()

        def load(self):
            if not self.resident:
                where["loaded", self.name] = threading.get_ident()
            self.resident = True

        def unload(self):
            self.resident = False

    engines = {"small": Arriving("small", True), "large": Arriving("large", False)}
    plan = parse_plan("small:3 large:*", time_grid(6))
    decided = plan_residency(
        plan, call_parts(engines, {}, ClipSize(32, 32, 5), 1), mode="prefetched"
    )
    residency = Residency(decided, engines)
    for i in range(6):
        residency.enter(i)
    residency.close()
    assert where["reserved", "large"] == main and where["loaded", "large"] != main
    assert ("reserved", "small") not in where


def test_weights_come_to_the_places_that_were_reserved(monkeypatch):
    layer = torch.nn.Linear(3, 2)
    values = [p.detach().clone() for p in layer.parameters()]
    away = [True]
    monkeypatch.setattr(Moved, "resident", property(lambda self: not away[0]))
    moved = Moved(layer, torch.device("cpu"))
    moved.reserve()
    places = [p.data_ptr() for p in moved.places]
    moved.reserve()
    assert [p.data_ptr() for p in moved.places] == places  # once
    moved.load()
    assert [p.data_ptr() for p in layer.parameters()] == places and not moved.places
    assert all(torch.equal(p, v) for p, v in zip(layer.parameters(), values, strict=True))
    assert isinstance(layer.weight, torch.nn.Parameter) and layer.weight.requires_grad
    away[0] = False
    moved.reserve()
    assert not moved.places  # they are there


class Graph:
    replayed = 0

    def replay(self):
        Graph.replayed += 1


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@pytest.fixture
def recording(monkeypatch):
    """CUDA's calls of a recording, noted."""
    notes = SimpleNamespace(handles=0, graphs=[])

    class Context:
        def __init__(self, graph=None, **options):
            if graph is not None:
                notes.graphs.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def handle():
        notes.handles += 1
        return notes.handles

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", handle)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Context())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gc.collect()  # a pool ends with its last graph
    return notes


def test_a_recording_watches_its_own_thread_and_device(recording):
    device = torch.device("cuda:1")
    replay, result = cuda_graphs.capture(lambda: torch.ones(1), device)
    (options,) = recording.graphs
    assert options["capture_error_mode"] == "thread_local"
    assert options["stream"].device == device  # not the stream of whichever GPU recorded first
    before = Graph.replayed
    replay()
    assert Graph.replayed == before + 1 and torch.equal(result, torch.ones(1))


def test_a_pool_ends_with_its_last_graph(recording):
    device = torch.device("cuda:1")
    capture = lambda: cuda_graphs.capture(lambda: torch.ones(1), device)[0]
    first, second = capture(), capture()
    assert recording.handles == 1 and [g["pool"] for g in recording.graphs] == [1, 1]
    del first
    gc.collect()
    third = capture()
    assert recording.graphs[-1]["pool"] == 1  # one still holds it
    del second, third
    gc.collect()
    capture()
    assert recording.graphs[-1]["pool"] == 2  # PyTorch refuses the old one now


def test_memory_is_released_with_the_graphs(monkeypatch, tiny_pipe):
    released = []
    monkeypatch.setattr(cuda_graphs, "release", released.append)
    record = lambda call, device: (lambda: None, call())
    engine = ReplayedEngine(TorchEngine(tiny_pipe.engines["large"].model), record)
    context = engine.prepare(torch.randn(1, 5, 32))
    engine.unload()
    assert released == []  # nothing was recorded
    engine.velocity(torch.randn(1, 16, 1, 4, 4), torch.tensor(9.0), context)
    engine.unload()
    assert released == [torch.device("cpu")] and not engine.graphs


def test_an_engine_that_wraps_another_can_do_what_that_can(tiny_pipe):
    """Python 3.12's isinstance does not look through `__getattr__`."""
    inner = TorchEngine(tiny_pipe.engines["large"].model)
    replayed = ReplayedEngine(inner, lambda call, device: (lambda: None, call()))
    for protocol in (Streamed, Diagnosable, Reserving, Changeable):
        assert supports(inner, protocol) and supports(replayed, protocol)
    exported = ReplayedEngine(Flat(), lambda call, device: (lambda: None, call()))
    assert not any(supports(exported, p) for p in (Streamed, Diagnosable, Reserving, Changeable))


@pytest.mark.parametrize(
    "device, provider, wanted",
    [
        ("cuda:1", None, [("CUDAExecutionProvider", {"device_id": "1"})]),
        ("cuda", None, [("CUDAExecutionProvider", {"device_id": "0"})]),
        ("cpu", None, [("CPUExecutionProvider", {})]),
        (
            "cuda:1",
            "tensorrt",
            [
                ("TensorrtExecutionProvider", {"device_id": "1"}),
                ("CUDAExecutionProvider", {"device_id": "1"}),
            ],
        ),
    ],
)
def test_a_session_computes_on_its_own_gpu(monkeypatch, device, provider, wanted):
    needs("onnxruntime")
    import onnxruntime as ort

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    folder = SimpleNamespace(manifest=SimpleNamespace(part="small", files={}), path=None)
    sessions = onnx.OnnxSessions.__new__(onnx.OnnxSessions)
    monkeypatch.setattr(
        onnx.Sessions, "__init__", lambda self, folder, d: setattr(self, "device", d)
    )
    sessions.__init__(folder, torch.device(device), provider)
    assert sessions.providers == wanted


def test_times_are_of_the_device_that_is_asked(monkeypatch):
    from nexus_rt.core.timing import median_ms

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    median_ms(lambda: None, 1, 0, torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")] * 2
    median_ms(lambda: None, 1, 0)
    assert len(waited) == 2


if sys.version_info >= (3, 12):

    def test_isinstance_indeed_does_not_see_it(tiny_pipe):
        inner = TorchEngine(tiny_pipe.engines["large"].model)
        replayed = ReplayedEngine(inner, lambda call, device: (lambda: None, call()))
        assert not isinstance(replayed, Streamed)
