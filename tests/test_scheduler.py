"""A folder's own schedule: what diffusers takes of `scheduler_config.json` becomes the defaults, and
what is not computed here is refused or said."""

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from nexus_rt.core.errors import ModelError
from nexus_rt.core.limits import SOLVERS
from nexus_rt.core.size import ClipSize
from nexus_rt.loading.pair_folder import find_pair
from nexus_rt.loading.scheduler import CLASSES, FIXED, WALK, find_scheduler
from nexus_rt.pipeline.defaults import exported_pair, pair_defaults, pair_index
from nexus_rt.pipeline.request import make_plan
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests.refusals import refuses

SIZE = dict(height=32, width=48, num_frames=5)
UNIPC = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


def pipeline(root, pair, name="large", scheduler=None, index=None):
    """A diffusers pipeline's folder with a tiny pair's transformer, VAE and text encoder."""
    root.mkdir()
    for part in ("vae", "text_encoder", "tokenizer"):
        (root / part).symlink_to(pair / part)
    (root / "transformer").symlink_to(pair / name)
    (root / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", **(index or {})})
    )
    if scheduler is not None:
        scheduler.save_pretrained(root / "scheduler")
    return root


def edit(root, **changes):
    """The same folder, fields of its scheduler's config set; None takes one out."""
    path = root / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    config = json.loads(path.read_text()) if path.is_file() else {}
    config = {k: v for k, v in {**config, **changes}.items() if not (k in changes and v is None)}
    path.write_text(json.dumps(config))
    return root


@pytest.fixture
def unipc(tiny_pair, tmp_path):
    from diffusers import UniPCMultistepScheduler

    return pipeline(
        tmp_path / "wan", tiny_pair, scheduler=UniPCMultistepScheduler(**UNIPC, flow_shift=3.0)
    )


def made(name, **options):
    import diffusers

    return getattr(diffusers, name)(**options)


@pytest.mark.parametrize(
    "name, options, shift, solver",
    [
        ("UniPCMultistepScheduler", dict(**UNIPC, flow_shift=3.0), 3.0, "unipc"),
        ("UniPCMultistepScheduler", dict(**UNIPC), 1.0, "unipc"),
        ("FlowMatchEulerDiscreteScheduler", dict(shift=7.0), 7.0, "euler"),
        ("FlowMatchEulerDiscreteScheduler", dict(shift=8.0, stochastic_sampling=True), 8.0, "lcm"),
        ("FlowMatchLCMScheduler", dict(shift=2.5), 2.5, "lcm"),
    ],
)
def test_what_diffusers_saves_is_taken(tiny_pair, tmp_path, name, options, shift, solver):
    root = pipeline(tmp_path / "wan", tiny_pair, scheduler=made(name, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_scheduler(root)
    assert (found.shift, found.solver) == (shift, solver)
    defaults = pair_defaults(find_pair(None, {"large": root}, {}).stated)
    assert (defaults.shift, defaults.solver) == (shift, solver)


def test_a_call_walks_the_folders_schedule(unipc, tmp_path):
    """The frames are those of a call that names shift and solver, and not those of Wan's own."""
    from nexus_rt import NexusPipeline

    def clip(root, **call):
        pipe = NexusPipeline.from_pretrained(large=root)
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        out = pipe(
            "a panda",
            plan="large",
            generator=g,
            output_type="latent",
            num_inference_steps=4,
            **SIZE,
            **call,
        )
        return out.frames

    edit(unipc, _class_name="FlowMatchEulerDiscreteScheduler", shift=9.0)
    own = clip(unipc)
    assert torch.equal(own, clip(unipc, shift=9.0, solver="euler"))
    assert not torch.equal(own, clip(unipc, shift=5.0))
    assert not torch.equal(own, clip(unipc, solver="unipc"))
    shutil.rmtree(unipc / "scheduler")
    plain = clip(unipc)
    assert torch.equal(plain, clip(unipc, shift=5.0, solver="unipc")) and not torch.equal(
        plain, own
    )


def test_as_published_and_a_list_go_before(unipc):
    defaults = pair_defaults(find_pair(None, {"large": unipc}, {}).stated)
    assert make_plan(CallSettings(plan="large"), defaults).grid.shift == 3.0
    assert make_plan(CallSettings(plan="large", shift=4.0), defaults).grid.shift == 4.0
    assert make_plan(CallSettings(as_published=True), defaults).grid.shift == 5.0


REFUSED = {
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "use_flow_sigmas": [False],
    "num_train_timesteps": [100, 1001, "1000"],
    "final_sigmas_type": ["sigma_min"],
    "use_dynamic_shifting": [True],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "invert_sigmas": [True],
    "shift_terminal": [0.1],
    "scale_factors": [[0.5, 1.0]],
    "thresholding": [True],
}


@pytest.mark.parametrize("field", FIXED)
def test_other_noise_levels_and_predictions_are_refused(unipc, field):
    for value in REFUSED[field]:
        edit(unipc, **{field: value})
        with refuses("unsupported", field, ModelError) as error:
            find_pair(None, {"large": unipc}, {})
        # the way out
        assert "transformer/" in str(error.value)
    assert pair_defaults(find_pair(None, {"large": unipc / "transformer"}, {}).stated) == Defaults()


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "DDIMScheduler"},
        {"_class_name": "EulerDiscreteScheduler"},
        {"_class_name": "SelfForcingFlowMatchScheduler"},
        {"_class_name": ["UniPCMultistepScheduler"]},
        {"_class_name": None},
    ],
)
def test_schedules_that_are_not_known_are_refused(unipc, change):
    with refuses("unsupported", "_class_name", ModelError):
        find_scheduler(edit(unipc, **change))


@pytest.mark.parametrize(
    "code, values",
    [("out_of_range", [0, -1, 1e9]), ("invalid_type", ["3", True, [3.0], {}])],
)
def test_a_shift_that_is_none(unipc, code, values):
    for value in values:
        with refuses(code, "flow_shift", ModelError) as error:
            find_scheduler(edit(unipc, flow_shift=value))
        assert "scheduler_config.json" in str(error.value)


OTHER = {
    "solver_order": 3,
    "solver_type": "bh1",
    "predict_x0": False,
    "lower_order_final": False,
    "disable_corrector": [0, 1],
    "solver_p": {"x": 1},
}


@pytest.mark.parametrize("field", WALK)
def test_another_walk_of_the_same_schedule_is_said(unipc, field):
    with pytest.warns(UserWarning, match=rf"{field} is .*'unipc' \(order 2, bh2\)"):
        found = find_scheduler(edit(unipc, **{field: OTHER[field]}))
    assert (found.shift, found.solver) == (3.0, "unipc")


@pytest.mark.parametrize("name", [n for n, (_, solver) in CLASSES.items() if solver is None])
def test_solvers_that_are_not_ours_are_said(tiny_pair, tmp_path, name):
    """As diffusers saves them for flow matching: no other field is strange."""
    shift = CLASSES[name][0]
    options = UNIPC if shift == "flow_shift" else {}
    scheduler = made(name, **{**options, shift: 4.0})
    root = pipeline(tmp_path / "wan", tiny_pair, scheduler=scheduler)
    with pytest.warns(UserWarning) as record:
        found = find_scheduler(root)
    assert [f"its class is {name}" in str(w.message) for w in record] == [True]
    assert found.shift == 4.0 and found.solver in SOLVERS


def test_a_field_of_a_fork_is_named(unipc):
    with pytest.warns(UserWarning, match="not read here: warp_denoising_step"):
        find_scheduler(edit(unipc, warp_denoising_step=True))


def test_the_index_names_the_class(tiny_pair, tmp_path):
    """diffusers reads the config by the class of model_index.json."""
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    root = edit(
        pipeline(tmp_path / "wan", tiny_pair, scheduler=Euler(shift=6.0), index=index),
        _class_name="DDIMScheduler",
    )
    assert find_scheduler(root).solver == "euler" and find_scheduler(root).shift == 6.0


def test_the_large_generators_counts_and_a_difference_is_said(tiny_pair, tmp_path, unipc):
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    small = pipeline(tmp_path / "small", tiny_pair, "small", Euler(shift=5.0))
    with pytest.warns(
        UserWarning, match="differ .shift 3.0 and 5.0, solver unipc and euler.; the first"
    ):
        defaults = pair_defaults(find_pair(None, {"large": unipc, "small": small}, {}).stated)
    assert (defaults.shift, defaults.solver) == (3.0, "unipc")
    shutil.rmtree(unipc / "scheduler")
    defaults = pair_defaults(find_pair(None, {"large": unipc, "small": small}, {}).stated)
    assert (defaults.shift, defaults.solver) == (5.0, "euler")


def test_a_pairs_own_config_and_a_recipe_go_before(own_pair, unipc):
    """The user, a recipe, the pair, the scheduler, Wan: in this order."""
    from nexus_rt.pipeline.recipes import Recipe, with_recipes

    shutil.copytree(unipc / "scheduler", own_pair / "large" / "scheduler")
    path = own_pair / "model_index.json"
    index = json.loads(path.read_text())
    assert pair_defaults(find_pair(own_pair, {}, {}).stated).shift == 3.0
    index["defaults"] |= {"shift": 2.0, "solver": "euler"}
    path.write_text(json.dumps(index))
    defaults = pair_defaults(find_pair(own_pair, {}, {}).stated)
    assert (defaults.shift, defaults.solver) == (2.0, "euler")
    assert defaults.num_inference_steps == 6  # the rest is the pair's
    recipe = with_recipes(defaults, {"large": Recipe(4, (1000, 750, 500, 250), 7.0, 1.0, "euler")})
    assert make_plan(CallSettings(plan="large"), recipe).grid.shift == 7.0
    assert (
        make_plan(CallSettings(plan="large", num_inference_steps=4, shift=8.0), recipe).grid.shift
        == 8.0
    )
    shutil.rmtree(own_pair / "large" / "scheduler")
    shutil.copytree(unipc / "scheduler", own_pair / "scheduler")
    index["defaults"].pop("shift")
    path.write_text(json.dumps(index))
    # of the pair's own folder
    assert pair_defaults(find_pair(own_pair, {}, {}).stated).shift == 3.0


def test_the_mini_pair_stays_as_it_is():
    from nexus_rt.loading.pair_folder import MINI

    defaults = pair_defaults(find_pair(MINI, {}, {}).stated)
    assert (defaults.shift, defaults.solver) == (3.0, None)


def test_engines_keep_the_schedule(unipc, own_pair, tmp_path):
    defaults = pair_defaults(find_pair(None, {"large": unipc}, {}).stated)
    index = pair_index(None, defaults)
    assert index["defaults"]["shift"] == 3.0 and index["defaults"]["solver"] == "unipc"
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "model_index.json").write_text(json.dumps(index))
    same = dict.fromkeys(("in_channels", "out_channels", "patch_size", "text_dim"), 1)
    manifest = SimpleNamespace(architecture=same)
    size = ClipSize(48, 32, 5)
    engine = SimpleNamespace(folder=SimpleNamespace(manifest=manifest), buckets=[size])
    _, exported = exported_pair(tmp_path / "engines", {"large": engine})
    assert exported == defaults.replace(**size.options)
    assert pair_index(None, Defaults()) is None
    own = pair_defaults(find_pair(own_pair, {}, {}).stated)
    assert pair_index(own_pair, own) == own_pair / "model_index.json"


def test_another_pipelines_index_is_said(tiny_pair, tmp_path):
    root = pipeline(tmp_path / "fast", tiny_pair, index={"_class_name": "WanDMDPipeline"})
    with pytest.warns(UserWarning, match="is of a WanDMDPipeline.*recipe"):
        find_pair(None, {"large": root}, {})


def test_an_unknown_default_solver_is_refused(own_pair):
    path = own_pair / "model_index.json"
    index = json.loads(path.read_text())
    index["defaults"]["solver"] = "heun"
    path.write_text(json.dumps(index))
    with refuses("unknown_name", kind=ModelError) as error:
        pair_defaults(find_pair(own_pair, {}, {}).stated)
    assert "heun" in str(error.value)
