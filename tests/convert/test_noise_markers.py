"""What tensors and settings say of the noise levels of Stable Diffusion XL, in every layout."""

import json
from dataclasses import replace

import make_checkpoint
import pytest
import torch
from conftest import refused
from hostile import look, refused_model
from safetensors.torch import load_file, save_file

import sd
from convert.actions.convert import convert
from convert.actions.diffusers_writer import folder_settings
from convert.actions.inspect import inspect
from convert.actions.target import TargetError
from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.families.diffusers_config import with_settings
from convert.layouts.noise_levels import marking, shortest
from sd.config import SDXL
from sd.runtime.vae_trial import vae_warning

CONFIG = make_checkpoint.tiny(SDXL)
MEANS, DEVIATIONS = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
EMPTY = torch.empty(0)
PLAYGROUND = {"edm_mean": torch.tensor(MEANS), "edm_std": torch.tensor(DEVIATIONS)}
COSXL = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
OF_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
OF_PLAYGROUND = {"latent_scale": 1.0, "latent_means": MEANS, "latent_deviations": DEVIATIONS}


def with_levels(prediction, levels=(), latents=()):
    schedule, vae = replace(CONFIG.schedule, **dict(levels)), replace(CONFIG.vae, **dict(latents))
    return replace(CONFIG, prediction=prediction, schedule=schedule, vae=vae)


EXPECTED = {  # the tensors -> what they mean
    "playground": (PLAYGROUND, with_levels("edm", OF_EDM, OF_PLAYGROUND)),
    "cosxl": (COSXL, with_levels("v", {"sigma_min": 0.002, "sigma_max": 120.0})),
    "v": ({"v_pred": EMPTY}, with_levels("v")),
    "zero-SNR v": ({"v_pred": EMPTY, "ztsnr": EMPTY}, with_levels("v")),
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    made = make_checkpoint.made_up_state_dict(CONFIG, dtype=torch.float16)
    return {name: value.contiguous().clone() for name, value in made.items()}


@pytest.fixture
def save(tmp_path, state):
    def save(extra, name="m.safetensors", metadata=None):
        save_file(state | {name: value.clone() for name, value in extra.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return save


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_tensors_give_the_prediction_the_sigmas_and_the_scale_of_latents(save, kind):
    tensors, expected = EXPECTED[kind]
    checkpoint = look(save(tensors))
    assert checkpoint.config == expected
    assert checkpoint.said.warnings == checkpoint.unknown == ()
    assert checkpoint.said.begins_at_noise == ("ztsnr" in tensors)
    report = inspect(save(tensors))
    assert (report.problem, report.prediction, report.family) == (None, expected.prediction, "sdxl")
    assert report.schedule == expected.schedule
    if expected.schedule.sigma_max:
        assert any("without timesteps: best with --schedule karras" in note for note in report.notes)
        assert report.kind.endswith("(built like SDXL)")


@pytest.mark.parametrize(
    ("extra", "sigmas"),
    [
        ({"edm_vpred.sigma_max": torch.tensor([80.0])}, (0.002, 80.0)),
        ({name: value.half() for name, value in COSXL.items()}, (0.0020008087, 120.0)),
        ({"edm_vpred.sigma_max": EMPTY}, (0.002, 120.0)),
        ({"edm_mean": EMPTY, "edm_std": EMPTY}, (0.002, 80.0)),
        ({name: value.reshape(1, 4, 1, 1) for name, value in PLAYGROUND.items()}, (0.002, 80.0)),
    ],
)  # fmt: skip
def test_other_shapes_and_precisions_are_read_and_what_is_empty_means_the_published_values(save, extra, sigmas):
    config = look(save(extra)).config
    assert (config.schedule.sigma_min, config.schedule.sigma_max) == pytest.approx(sigmas, rel=1e-7)
    assert config.vae.latent_means in ((), MEANS)


@pytest.mark.parametrize(
    "extra",
    [
        {"edm_mean": torch.zeros(4)},
        {"edm_mean": torch.zeros(3), "edm_std": torch.ones(4)},
        {"edm_mean": torch.zeros(4), "edm_std": torch.tensor([1.0, 1.0, 0.0, 1.0])},
        {"edm_mean": torch.full((4,), torch.nan), "edm_std": torch.ones(4)},
        {"edm_mean": torch.zeros(4, dtype=torch.int64), "edm_std": torch.ones(4)},
        {"edm_vpred.sigma_max": torch.tensor(0.001)},
        {"edm_vpred.sigma_max": torch.tensor(120)},
        {"edm_vpred.sigma_max": torch.full((70_000,), 120.0)},
        {"edm_vpred.sigma_max": torch.tensor(torch.inf)},
        {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(-1.0)},
    ],
)
def test_numbers_that_cannot_be_used_are_refused(save, extra):
    refused_model(save(extra), UnsupportedFileError, "edm_")


def test_the_caller_may_overrule_what_they_say_of_the_prediction(save):
    from convert.checkpoint import read_checkpoint
    from convert.files.reader import open_checkpoint

    with open_checkpoint(save(PLAYGROUND)) as file:
        assert read_checkpoint(file, prediction="v").config.prediction == "v"
    assert look(save(PLAYGROUND, metadata={"modelspec.predict_key": "epsilon"})).said.warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["playground", "cosxl"])
def test_layouts_lead_to_each_other_and_back(save, tmp_path, state, kind):
    tensors, expected = EXPECTED[kind]
    convert(save(tensors), tmp_path / "ours.safetensors", verify=True)
    convert(tmp_path / "ours.safetensors", tmp_path / "folder", layout="diffusers", verify=True)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", layout="original", verify=True)
    for name in ("ours.safetensors", "folder", "back.safetensors"):
        assert look(tmp_path / name).config == expected, name
    found = load_file(tmp_path / "back.safetensors")
    assert {name: found[name].flatten().tolist() for name in tensors} == {
        name: value.flatten().tolist() for name, value in tensors.items()
    }
    assert "v_pred" not in found
    assert found.keys() - tensors.keys() <= state.keys()


def settings_of(config):
    files = folder_settings(config)
    return {name.partition("/")[0]: dict(values) for name, values in files.items() if "config" in name}


@pytest.mark.parametrize("kind", ["playground", "cosxl"])
def test_the_settings_of_a_folder_are_those_of_the_library(kind):
    from diffusers import AutoencoderKL, EDMEulerScheduler

    expected = EXPECTED[kind][1]
    settings = settings_of(expected)
    scheduler = EDMEulerScheduler.from_config(settings["scheduler"])
    assert (scheduler.config.sigma_data, scheduler.config.sigma_max) == (0.5, 80) if kind == "playground" else (1, 120)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(settings["vae"])
    assert vae.config.scaling_factor == (0.5 if kind == "playground" else 0.13025)
    assert vae.config.latents_mean == (list(MEANS) if kind == "playground" else None)
    assert with_settings(CONFIG, settings) == expected


OTHER = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, ("edm", 0.002, 80.0, 0.5)),  # published
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_max": 120.0, "prediction_type": "v_prediction"},
         ("v", 0.002, 120.0, 1.0)),
        (OTHER | {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "sigma_min": 0.002,
          "sigma_max": 120.0, "prediction_type": "v_prediction"}, ("v", 0.002, 120.0, 1.0)),
        (OTHER | {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, UnsupportedFileError),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, UnsupportedFileError),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": "high"}, WeightMismatchError),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 0.001}, WeightMismatchError),
    ],
)  # fmt: skip
def test_schedulers_with_sigmas_are_read(scheduler, expected):
    settings = settings_of(CONFIG) | {"scheduler": scheduler}
    if isinstance(expected, type):
        with pytest.raises(expected):
            with_settings(CONFIG, settings)
        return
    config = with_settings(CONFIG, settings)
    levels = config.schedule
    assert (config.prediction, levels.sigma_min, levels.sigma_max, levels.sigma_data) == expected
    assert config.vae.latent_scale == 0.13025 / levels.sigma_data


@pytest.mark.slow
def test_what_the_original_layout_cannot_say_is_refused_before_the_work(save, tmp_path):
    convert(save(PLAYGROUND), tmp_path / "folder", layout="diffusers")
    path = tmp_path / "folder/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sigma_max": 90.0}))
    with pytest.raises(TargetError, match="cannot store the noise schedule"):
        convert(tmp_path / "folder", tmp_path / "x.safetensors", layout="original")
    assert marking(look(tmp_path / "folder").config) == marking(CONFIG) == {}


@pytest.mark.slow
def test_models_that_are_told_the_noise_level_in_other_ways_are_not_merged(save, run):
    cosxl, other = save(COSXL, "cosxl.safetensors"), save({"v_pred": EMPTY}, "v.safetensors")
    refused(run("merge", other, cosxl, "-o", "x.safetensors"), "cosxl.safetensors has a UNet that is told sigma")


@pytest.mark.parametrize("kind", ["playground", pytest.param("cosxl", marks=pytest.mark.slow)])
def test_a_picture_is_made_at_these_levels(save, kind):
    model = sd.load(save(EXPECTED[kind][0]), precision="fp32")
    assert vae_warning(model) is None  # a scale of its own is no mistake
    (picture,) = model.txt2img("a cat", width=64, height=64, steps=1, seed=1)
    assert picture.size == (64, 64)
    (other,) = model.img2img("a cat", picture, size=(64, 64), steps=2, strength=0.6, seed=1)
    assert other.size == (64, 64)


@pytest.mark.parametrize("value", [0.002, 80.0, -1.6574, 1 / 3, 0.0, 5e-324])
def test_numbers_are_written_with_as_few_digits_as_float32_needs(value):
    stored = torch.tensor(value).item()
    assert torch.tensor(shortest(stored)).item() == stored
    assert len(repr(shortest(stored))) <= max(len(repr(value)), 12)
