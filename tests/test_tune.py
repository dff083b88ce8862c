"""The search: its interval and front against their definitions, a small search that goes on where it
was, and what the command and `--plan @front` refuse."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.bench.tune import report
from nexus_rt.bench.tune.judging import LatentJudge, PixelJudge, StatisticsJudge, VlmJudge, noise
from nexus_rt.bench.tune.search import Row, Search, interval, pareto
from nexus_rt.bench.tune.space import Candidate, Space
from nexus_rt.cli import main
from nexus_rt.core.errors import InputError
from nexus_rt.core.size import ClipSize
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import time_grid
from nexus_rt.pipeline.front import from_front, read_front
from tests.needs import needs
from tests.refusals import refuses

COSTS = StepCosts(1, 2, 6, 12)
SIZE = ClipSize(48, 32, 5).options


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(1, 9), st.floats(0, 1)), min_size=1, max_size=12))
def test_a_front_is_what_nothing_beats(points):
    rows = [Row(Candidate(str(i)), p, [s], 0.0) for i, (p, s) in enumerate(points)]
    front = pareto(rows)
    beaten = lambda r: any(
        o.price <= r.price and o.score >= r.score and (o.price, o.score) != (r.price, r.score)
        for o in rows
    )
    assert {(r.price, r.score) for r in front} == {
        (r.price, r.score) for r in rows if not beaten(r)
    }
    assert [r.price for r in front] == sorted({r.price for r in front})


def test_the_interval_covers():
    rng, inside = np.random.default_rng(0), []
    for _ in range(400):
        p = rng.uniform(0.1, 0.95)
        low, high = interval((rng.random(60) < p).astype(float).tolist())
        inside.append(low <= p <= high)
    assert np.mean(inside) > 0.92
    assert interval([1.0] * 6)[0] < 0.95 and interval([0.5])[1] == 1.0


class Fixed:
    """A trial of Optuna that makes given choices."""

    def __init__(self, rng):
        self.rng, self.chosen = rng, {}

    def suggest_categorical(self, name, values):
        return self.chosen.setdefault(name, values[int(self.rng.integers(len(values)))])

    def suggest_int(self, name, low, high):
        return self.chosen.setdefault(name, int(self.rng.integers(low, high + 1)))

    def suggest_float(self, name, low, high):
        return self.chosen.setdefault(name, float(self.rng.uniform(low, high)))


def test_every_plan_of_the_space_is_one():
    rng, grid, names = np.random.default_rng(1), time_grid(20, 3.0), set()
    for _ in range(300):
        candidate = Space().suggest(Fixed(rng), grid)
        plan = parse_plan(candidate.plan, grid)
        assert plan.name == candidate.plan and plan.generators == ("small", "large")
        names.add(candidate.plan)
    assert len(names) > 250


def a_search(pipe, folder, **options):
    judge = lambda texts: LatentJudge(pipe, texts, "reference", 3, **SIZE)
    return Search(
        pipe,
        judge([f"a red circle {i}" for i in range(6)]),
        judge([f"a blue square {i}" for i in range(3)]),
        COSTS,
        folder,
        **{"rungs": (2, 4, 6), "batch": 2, "options": SIZE, "seed": 3, **options},
    )


@pytest.fixture
def pipe(tiny_pipe, monkeypatch):
    """The tiny pair with few steps, so that its reference is quick."""

    monkeypatch.setattr(tiny_pipe, "defaults", tiny_pipe.defaults.replace(num_inference_steps=4))
    return tiny_pipe


def test_a_search_keeps_its_budget_goes_on_and_reports(pipe, tmp_path):
    needs("optuna")
    space = Space(small=(2, 5), large=(1, 3), rewrite=False)
    lines = []
    search = a_search(pipe, tmp_path, budget_ms=40.0, space=space, say=lines.append)
    first = search.run(3)
    assert first.tried == 3 and all(p.ms <= 40 for p in first.front)
    judged = search.judged(search.study())
    again = a_search(pipe, tmp_path, budget_ms=40.0, space=space, say=lines.append).run(5)
    assert again.tried == 5  # two more
    more = search.judged(search.study())
    assert judged.keys() < more.keys()
    assert all(more[k].scores == judged[k].scores for k in judged)
    assert sum(line.startswith("[") for line in lines) == 5
    assert again.default.plan == pipe.defaults.plan and again.default.count == 3
    for plan in again.front:
        assert 0 <= plan.low <= plan.score <= plan.high <= 1 and plan.count == 3
        assert abs(parse_plan(plan.plan, search.grid).price(COSTS, *search.scales) - plan.ms) < 1e-3
    with refuses("mismatch", kind=InputError) as caught:
        a_search(pipe, tmp_path, budget_ms=41.0, space=space).run(5)
    assert "budget" in str(caught.value)
    page = report.page(again, search, tmp_path, clips=1).read_text()
    assert page.count("<video") == len(again.front) + 1
    assert all((tmp_path / "clips" / f"{k}-0.mp4").is_file() for k in range(len(again.front) + 1))
    text = report.markdown(again)
    assert "5 plans tried, budget 40 ms; judged by latents of reference on 3 prompts" in text


def test_what_is_surely_worse_is_given_up_early(pipe, tmp_path):
    search = a_search(pipe, tmp_path)
    asked = []

    class RequestLimits:
        name, prompts = "known", [str(i) for i in range(60)]

        def scores(self, places, latents, frames):
            asked.extend(places)
            return [0.05] * len(places)

    search.search, search.rungs = RequestLimits(), (6, 18, 54)
    good = Row(Candidate("good"), 10.0, [0.9] * 54, 0.0)
    search.climb(Candidate("small:2/4 large:1"), 20.0, {"good": good})
    assert len(asked) == 6
    asked.clear()
    search.climb(Candidate("small:2/4 large:1"), 5.0, {"good": good})  # cheaper: it may stay
    assert len(asked) == 54


def test_prompts_of_the_search_are_not_reported_on(pipe, tmp_path):
    judge = LatentJudge(pipe, ["a", "b"], "reference", 0)
    with refuses("conflict", "report", InputError):
        Search(pipe, judge, judge, COSTS, tmp_path)


def test_a_budget_that_nothing_keeps(pipe, tmp_path):
    needs("optuna")
    with refuses("out_of_range", "budget", InputError):
        a_search(pipe, tmp_path, budget_ms=1.0, space=Space(rewrite=False)).run(1)


def test_the_best_plan_itself_scores_one(pipe):
    judge = LatentJudge(pipe, ["a red circle", "b"], "small:2/4 large:2", 3, **SIZE)
    latents = pipe(
        ["a red circle", "b"],
        plan="small:2/4 large:2",
        generator=noise([0, 1], 3),
        output_type="latent",
        **SIZE,
    ).frames
    assert np.allclose(judge.scores([0, 1], latents, None), 1, atol=1e-4)
    assert judge.scores([0], -latents[:1], None)[0] < 0.4


def test_statistics_forget_where_things_are(pipe):
    """A mirrored clip is as good, a still or a blurred one is not."""
    from scipy import ndimage

    judge = StatisticsJudge(pipe, ["a red circle"], "small:2/4 large:2", 3, **SIZE)
    latents = pipe(
        ["a red circle"],
        plan="small:2/4 large:2",
        generator=noise([0], 3),
        output_type="latent",
        **SIZE,
    ).frames
    clip = pipe.decode(latents)
    score = lambda frames: judge.scores([0], latents, frames)[0]
    assert score(clip) > 0.999 and score(clip[:, :, :, ::-1]) > 0.999
    assert score(np.repeat(clip[:, :1], clip.shape[1], 1)) < 0.1
    assert score(ndimage.gaussian_filter(clip, (0, 0, 1.5, 1.5, 0))) < 0.7


def test_pixels_know_right_from_wrong_and_fine_from_flat():
    from nexus_rt import NexusPipeline
    from nexus_rt.bench.shapes import world

    pipe = NexusPipeline.from_pretrained(device="cpu")
    judge = PixelJudge(pipe, 2, 7)
    draw = lambda place: world.render(
        judge.riddles[place].scene, np.random.default_rng([7, place, 3]), 17, 64
    )
    video = torch.from_numpy(draw(0)).float().transpose(0, 1)[None]
    true = pipe.decode(pipe.vae.encode(video))
    assert judge.scores([0], None, true)[0] > 0.99
    noisy = np.clip(true + np.random.default_rng(0).normal(0, 0.05, true.shape), 0, 1)
    assert 0 < judge.scores([0], None, noisy)[0] < 0.95
    assert judge.scores([0], None, np.zeros_like(true)) == [0.0]


def test_a_vlm_judge_weighs_its_answers():
    from nexus_rt.bench.vrbench.command import EXAMPLE
    from nexus_rt.bench.vrbench.schema import read_bench, read_taxonomy
    from nexus_rt.core.chat import Reply

    prompts = [p for p in read_bench(EXAMPLE, read_taxonomy()) if len(p.questions) > 1][:1]
    first = prompts[0].questions[0]

    class Judge:
        name, parallel = "stub", False

        def reply(self, talk, frames):
            answers = {
                q.id: {"answer": "Yes" if q is first else "No", "reason": ""}
                for q in prompts[0].questions
            }
            return Reply(json.dumps(answers))

    judge = VlmJudge(Judge(), prompts)
    (score,) = judge.scores([0], None, np.zeros((1, 8, 16, 16, 3)))
    total = sum(q.weight for q in prompts[0].questions)
    assert abs(score - first.weight / total) < 1e-9


def test_the_command_and_the_front_it_writes(tiny_pair, tmp_path, capsys):
    needs("optuna")
    lists = []
    for name in ("search", "report"):
        lists.append(tmp_path / f"{name}.txt")
        lists[-1].write_text("".join(f"a {name} {i}\n" for i in range(3)))
    line = ["tune", "--pair", str(tiny_pair), "-o", str(tmp_path / "out"), "--trials", "2"]
    line += ["--rungs", "2,3", "--batch", "3", "--costs", "2,12", "--size", "48x32"]
    line += ["--frames", "5", "--prompts", str(lists[0]), "--report-prompts", str(lists[1])]
    line += ["--best", "small:2/4 large:2"]
    assert main(line) == 0
    assert "2 plans tried" in capsys.readouterr().out
    path = tmp_path / "out" / "front.json"
    front = read_front(path)
    dearest = front.front[-1]
    assert from_front(f"@{path}:100000ms") == max(front.front, key=lambda p: p.score)
    with refuses("out_of_range", "plan", InputError):
        from_front(f"@{path}:0.001")
    out = tmp_path / "x.png"
    command = ["generate", "a", "--pair", str(tiny_pair), "--size", "48x32", "--frames", "5"]
    assert main([*command, "--plan", f"@{path}:{dearest.ms + 1}", "-o", str(out)]) == 0
    assert f"plan {from_front(f'@{path}:{dearest.ms + 1}').plan}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        (["--trials", "0"], "--trials is 0"),
        (["--rungs", "6,3"], "rising numbers"),
        (["--rungs", "x"], "expected numbers of prompts"),
        (["--budget", "-1"], "--budget is -1"),
        (["--judge", "pixel"], "did you mean 'pixels'"),
        (["--judge", "latents"], "needs two disjoint lists"),
        (["--prompts", "x.txt"], "makes its own riddles"),
        (["--judge-url", "http://x"], "goes with --judge vlm"),
    ],
)
def test_wrong_arguments(options, words, tmp_path, capsys):
    needs("optuna")
    assert main(["tune", "-o", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, code", [("@front.json", "invalid_value"), ("@nowhere.json:9", "not_found")]
)
def test_a_front_that_is_none(text, code):
    with refuses(code, kind=InputError):
        from_front(text)


def test_a_front_that_is_something_else(tmp_path):
    path = tmp_path / "front.json"
    path.write_text('{"front": 3}')
    with refuses("invalid_type", "front", InputError):
        from_front(f"@{path}:9")


DAMAGED = [
    "not json\n",
    "[]\n",
    '{"op_code": 99}\n',
    '{"op_code": 0, "worker_id": "x"}\n',
    '"\\ud800"\n',
    "\xff\n",
    "[" * 5000 + "\n",
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_journal_is_one_sentence(tiny_pipe, tmp_path, line):
    needs("optuna")
    search = Search(tiny_pipe, FakeJudge("ab"), FakeJudge("cd"), COSTS, tmp_path)
    search.study()
    log = tmp_path / "search.log"
    log.write_text(line + log.read_text())
    with refuses("damaged", kind=InputError) as caught:
        search.study()
    assert str(log) in str(caught.value)


@pytest.mark.parametrize(
    "attributes, code, param",
    [
        ({"scores": "x", "plan": "large", "rewrite": "off"}, "invalid_type", "scores"),
        ({"scores": [2.0], "plan": "large", "rewrite": "off"}, "out_of_range", "scores[0]"),
        ({"scores": [[1]], "plan": "large", "rewrite": "off"}, "invalid_type", "scores[0]"),
        ({"scores": [0.5], "rewrite": "off"}, "missing", "plan"),
        ({"scores": [0.5], "plan": ["large"], "rewrite": "off"}, "invalid_type", "plan"),
        ({"scores": [0.5], "plan": "large", "rewrite": 3}, "invalid_type", "rewrite"),
        (
            {"scores": [0.5], "plan": "large", "rewrite": "off", "wall_ms": "long"},
            "invalid_type",
            "wall_ms",
        ),
    ],
    ids=range(7),
)
def test_a_trial_of_wrong_types_is_one_sentence(tiny_pipe, tmp_path, attributes, code, param):
    needs("optuna")
    search = Search(tiny_pipe, FakeJudge("ab"), FakeJudge("cd"), COSTS, tmp_path)
    study = search.study()
    trial = study.ask()
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    study.tell(trial, [1.0, 0.5])
    with refuses(code, param, InputError) as caught:
        search.judged(study)
    assert "search.log: trial 0" in str(caught.value)


def test_settings_of_wrong_types_are_another_search(tiny_pipe, tmp_path):
    needs("optuna")
    search = Search(tiny_pipe, FakeJudge("ab"), FakeJudge("cd"), COSTS, tmp_path)
    search.study().set_user_attr("settings", [1])
    with refuses("mismatch", kind=InputError):
        search.study()


class FakeJudge:
    """Prompts alone."""

    name = "fake"

    def __init__(self, prompts):
        self.prompts = list(prompts)


COSTS = StepCosts(1.0, 2.0, 5.0, 10.0)
