"""What a UNet predicts and at which noise levels it was trained: what tells, in which order, and who is told."""

import json

import families
import make_checkpoint
import pytest
import safetensors.torch
import torch
from conftest import TINY, refused
from hostile import look

from convert.actions.convert import convert
from convert.actions.inspect import inspect
from convert.actions.original_writer import original_state_dict, schedule_buffers
from convert.actions.target import TargetError
from convert.checkpoint import read_checkpoint
from convert.files.reader import open_checkpoint
from convert.layouts.names import parameter_shapes
from convert.layouts.noise_schedule import SPREAD_BIAS
from convert.single_part import read_part
from sd.config import SD_V2

V_YAML, EPS_YAML = 'model: {params: {parameterization: "v"}}', "model:\n  params:\n    parameterization: eps\n"
V_KEY, EPS_KEY = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
MARKER = {"v_pred": torch.empty(0)}


@pytest.fixture
def save(tmp_path, plain):
    """A narrow model with these tensors, this metadata and this .yaml beside it."""

    def save(extra=None, metadata=None, yaml=None, name="m.safetensors"):
        state = plain | (extra or {})
        if name.endswith(".ckpt"):
            torch.save({"state_dict": state}, tmp_path / name)
        else:
            safetensors.torch.save_file(state, tmp_path / name, metadata)
        if yaml is not None:
            (tmp_path / name).with_suffix(".yaml").write_text(yaml)
        return tmp_path / name

    return save


def read(path, **options):
    with open_checkpoint(path) as file:
        return read_checkpoint(file, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "metadata", "yaml", "asked", "expected", "why", "warnings"),
    [
        ({}, {}, None, "auto", "eps", "its family", 0),
        ({}, {}, None, "v", "v", "--prediction", 0),
        (MARKER, {}, None, "auto", "v", "its tensor v_pred", 0),
        ({}, {}, V_YAML, "auto", "v", "m.yaml beside it", 0),
        (MARKER, {}, EPS_YAML, "auto", "eps", "m.yaml beside it", 1),
        ({}, V_KEY, None, "auto", "v", "modelspec.prediction_type in its metadata", 0),
        ({}, V_KEY, EPS_YAML, "auto", "v", "modelspec.prediction_type in its metadata", 1),
        (MARKER, EPS_KEY, V_YAML, "auto", "eps", "modelspec.prediction_type in its metadata", 2),
        (MARKER, V_KEY, V_YAML, "eps", "eps", "--prediction", 3),
        ({}, {"ss_v_parameterization": "True"}, None, "auto", "v", "ss_v_parameterization in its metadata", 0),
        ({}, {"modelspec.predict_key": "of doom"}, V_YAML, "auto", "v", "m.yaml beside it", 1),
        ({}, {}, "<html>", "auto", "eps", "its family", 1),
        ({}, {}, "model: {params: {parameterization: w}}", "auto", "eps", "its family", 1),
        ({}, {}, "other: 1\n", "auto", "eps", "its family", 0),
    ],
)  # fmt: skip
def test_the_first_that_tells_counts_and_the_others_are_named(
    save, extra, metadata, yaml, asked, expected, why, warnings
):
    checkpoint = read(save(extra, metadata, yaml), prediction=asked)
    assert (checkpoint.config.prediction, checkpoint.said.why) == (expected, why)
    assert len(checkpoint.said.warnings) == warnings
    assert checkpoint.unknown == ()


@pytest.mark.parametrize("name", ["m.ckpt", "a.b.safetensors"])
def test_a_yaml_belongs_to_the_file_of_its_name(save, name):
    path = save(yaml=V_YAML, name=name)
    assert look(path).config.prediction == "v"
    path.with_suffix(".yaml").rename(path.parent / "other.yaml")
    assert look(path).config.prediction == "eps"


def test_a_damaged_yaml_is_ignored_and_told(save):
    path = save(yaml="a" * 300_000)
    assert look(path).said.warnings == ("m.yaml beside it is ignored: it is larger than 256 kB.",)
    path.with_suffix(".yaml").unlink()
    path.with_suffix(".yaml").mkdir()
    assert look(path).said.warnings == ("m.yaml beside it is ignored: it is not a file.",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metadata", "yaml"), [({"modelspec.prediction_type": "sample"}, None), ({}, V_YAML.replace('"v"', "x0"))]
)
def test_a_unet_that_predicts_the_picture_is_told_by_metadata_and_yaml(save, tmp_path, metadata, yaml):
    """Every layout keeps it but a pickle of the original one, which has no place for it."""
    path = save({}, metadata, yaml)
    assert look(path).config.prediction == "x0"
    assert read(path, prediction="eps").config.prediction == "eps"
    for number, layout in enumerate(("original", "sd-zoo")):
        convert(path, tmp_path / f"{number}.safetensors", layout=layout)
        assert look(tmp_path / f"{number}.safetensors").config.prediction == "x0"
    with pytest.raises(TargetError, match=r"a \.ckpt in the original layout cannot say that the UNet predicts x0"):
        convert(path, tmp_path / "x.ckpt")


@pytest.mark.slow
def test_the_noise_levels_of_the_yaml_count_where_they_differ(save, tmp_path):
    text = "model: {params: {linear_start: %s, linear_end: %s}}"
    assert look(save(yaml=text % (0.00085, "0.0120"))).said.warnings == ()
    path = save(yaml=text % ("1e-4", 0.02))
    checkpoint = look(path)
    assert (checkpoint.config.schedule.beta_start, checkpoint.config.schedule.beta_end) == (1e-4, 0.02)
    assert checkpoint.said.warnings == (
        "noise from 0.0001 to 0.02, as m.yaml beside it says (usually 0.00085 to 0.012).",
    )
    convert(path, tmp_path / "folder", layout="diffusers")
    assert look(tmp_path / "folder").config.schedule == checkpoint.config.schedule
    with pytest.raises(TargetError, match="cannot store the noise schedule"):
        convert(path, tmp_path / "x.ckpt")
    for wrong in ((0.02, 0.01), ("one", 0.01), (0, 2), ("nan", "inf")):
        checkpoint = look(save(yaml=text % wrong))
        assert checkpoint.config.schedule == TINY.schedule
        assert "are ignored" in checkpoint.said.warnings[0]


# Who writes it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "layout", "asked"),
    [
        ("a.ckpt", "original", "v"),
        ("a.safetensors", "original", "eps"),
        ("a.safetensors", "original", "auto"),
        ("a.safetensors", "sd-zoo", "eps"),
        ("a", "diffusers", "v"),
    ],
)
def test_every_layout_holds_what_was_decided(save, tmp_path, target, layout, asked):
    """Whatever the metadata, the .yaml and the marker of the source say."""
    said = {"eps": (MARKER, V_KEY, V_YAML), "v": ({}, EPS_KEY, EPS_YAML), "auto": ({}, {}, V_YAML)}[asked]
    convert(save(*said), tmp_path / target, layout=layout, prediction=asked, keep_all=layout == "original", verify=True)
    checkpoint = look(tmp_path / target)
    assert (checkpoint.config.prediction, checkpoint.said.warnings) == ({"auto": "v"}.get(asked, asked), ())


def test_a_yaml_that_would_mislead_readers_of_the_new_file_is_met_before_the_work(save, tmp_path, run):
    (tmp_path / "x.yaml").write_text(EPS_YAML)
    refused(run("convert", save(MARKER), "x.ckpt"), "x.yaml is there already and says eps", "predicts v")
    assert not (tmp_path / "x.ckpt").exists()


def test_a_unet_alone_keeps_what_it_predicts(save, tmp_path):
    path = save(yaml=V_YAML)
    for number, (target, layout) in enumerate([("a.safetensors", "original"), ("b.safetensors", "sd-zoo")]):
        convert(path, tmp_path / target, layout=layout, part="unet", verify=True)
        with open_checkpoint(tmp_path / target) as file:
            assert read_part(file, "unet").config.prediction == "v", number


@pytest.mark.slow
def test_zero_terminal_snr_survives_every_layout(save, tmp_path):
    convert(save({**MARKER, "ztsnr": torch.empty(0)}), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", layout="diffusers")
    settings = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert (settings["_class_name"], settings["rescale_betas_zero_snr"]) == ("DDIMScheduler", True)
    convert(tmp_path / "folder", tmp_path / "b.ckpt")
    convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors", layout="original")
    for name in ("a.safetensors", "folder", "b.ckpt", "c.safetensors"):
        checkpoint = look(tmp_path / name)
        assert checkpoint.said.ends_in_noise
        assert checkpoint.said.begins_at_noise
        assert checkpoint.notes == (
            "trained with noise levels that end in pure noise (ztsnr), so pictures begin there: best with --schedule "
            "trailing --guidance-rescale 0.7; --no-zero-terminal-snr turns it off.",
        )


@pytest.mark.parametrize(
    ("extra", "metadata"),
    [({"ztsnr": torch.empty(0)}, {}), ({}, {"ss_zero_terminal_snr": "True"}), ({"alphas_cumprod": None}, {})],
)
def test_zero_terminal_snr_is_told_by_a_marker_metadata_or_a_table(save, extra, metadata):
    if "alphas_cumprod" in extra:  # as the common web UI stores it, the last entry not quite 0
        roots = schedule_buffers(TINY.schedule)["alphas_cumprod"].double().sqrt()
        table = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        extra = {"alphas_cumprod": table.clamp(min=4.8973451890853435e-08).float()}
    path = save(extra, metadata)
    assert look(path).said.ends_in_noise
    assert not look(path).said.begins_at_noise
    assert "but it predicts eps: pictures begin as usual" in look(path).notes[0]
    assert read(path, prediction="v").said.begins_at_noise


# Who is told


def test_inspect_says_what_is_predicted_and_why(save, run):
    path = save({**MARKER, "ztsnr": torch.empty(0)}, {}, EPS_YAML)
    _, out, _ = run("inspect", path)
    lines = [line.strip() for line in out]
    assert "predicts     eps, as m.yaml beside it says" in lines
    assert "warning      predicts eps, as m.yaml beside it says; its tensor v_pred says v." in lines
    assert any(line.startswith("marker of v-prediction ") for line in lines)
    assert any(line.startswith("marker of zero terminal SNR ") for line in lines)
    assert not any("unknown" in line for line in lines)
    found = json.loads(run("inspect", path, "--json")[1][0])
    assert (found["prediction"], found["prediction_because"]) == ("eps", "m.yaml beside it")
    assert found["schedule"].items() >= {"timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}.items()
    assert found["zero_terminal_snr"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metadata", "yaml", "step", "expected"),
    [
        ({}, None, None, None),
        ({"ss_zero_terminal_snr": "True"}, None, None, "v"),  # eps would say nothing of a picture there
        ({}, None, 875_000, "eps"),
        ({}, None, 140_000, "v"),
        ({"global_step": "875000"}, None, None, "eps"),
        ({"global_step": "140000"}, None, None, "v"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, None, "v"),
        ({}, V_YAML, 875_000, "v"),
        ({}, "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n", 140_000, "eps"),
    ],
)
def test_of_version_2_it_is_told_or_said_to_be_open(tmp_path, metadata, yaml, step, expected):
    state = {
        name: torch.zeros(shape, dtype=torch.float16) for name, shape in families.v2(width=32, text_width=64).items()
    }
    del state[SPREAD_BIAS]  # the rule of thumb has a test of its own
    path = tmp_path / ("m.ckpt" if step else "m.safetensors")
    if step:
        torch.save({"state_dict": state, "global_step": step}, path)
    else:
        safetensors.torch.save_file(state, path, metadata)
    if yaml:
        (tmp_path / "m.yaml").write_text(yaml)
    report = inspect(path)
    assert report.prediction == expected
    assert [warning for warning in report.warnings if "nothing tells" in warning] == (
        [] if expected else ["nothing tells whether it predicts eps or v. If pictures are noise, give --prediction."]
    )


@pytest.mark.parametrize(
    ("prediction", "beside", "expected"),
    [
        ("eps", {}, 512),
        ("v", {}, 768),
        ("eps", {"native_size": "256"}, 256),
        ("eps", {"native_size": "100"}, 512),  # no picture has it
    ],
)
def test_the_native_size_of_version_2_goes_with_it_where_the_file_has_none(tmp_path, prediction, beside, expected):
    config = make_checkpoint.tiny(SD_V2)
    weights = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    state = original_state_dict(config, weights)
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(state, path, {"modelspec.prediction_type": prediction, **beside})
    assert read(path).config.native_size == expected


# The command line


@pytest.mark.slow
def test_pictures_use_it_and_can_be_made_again(save, run, tmp_path):
    """The same picture by the flag, by a .yaml, by a marker, and by the picture's own settings."""
    path, quick = save(), ("-W", 64, "-H", 64, "--steps", 1, "-s", 1, "-q")
    run("txt2img", "x", "-m", path, *quick, "-o", "eps.png")
    run("txt2img", "x", "-m", path, *quick, "-o", "flag.png", "--prediction", "v")
    assert run("txt2img", "--like", "flag.png", "-m", path, "-q", "-o", "again.png")[0] == 0
    path.with_suffix(".yaml").write_text(V_YAML.replace("}}", ", linear_end: 0.02}}"))
    run("txt2img", "x", "-m", path, *quick, "-o", "noisy.png")
    path.with_suffix(".yaml").write_text(V_YAML)
    assert "noise levels [0.00085, 0.02] of a .yaml" in run("txt2img", "--like", "noisy.png", "-m", path, "-q")[2]
    code, _, err = run("txt2img", "x", "-m", path, *quick[:-1], "-o", "yaml.png")
    assert code == 0
    assert "predicts v, as m.yaml beside it says" in err
    path.with_suffix(".yaml").unlink()
    run("txt2img", "--like", "yaml.png", "-m", path, "-q", "-o", "yaml-again.png")
    files = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("eps", "flag", "again", "yaml", "yaml-again")}
    assert len({files[name] for name in ("flag", "again", "yaml", "yaml-again")}) == 1
    assert files["eps"] != files["flag"]


def test_a_wrong_prediction_is_refused(save, run):
    refused(run("txt2img", "x", "-m", save(), "--prediction", "w"), "--prediction w")
    with pytest.raises(ValueError, match="must be one of auto, eps, v"):
        read(save(), prediction="velocity")


def test_a_name_of_the_longest_kind_has_no_yaml(save, tmp_path):
    path = save().rename(tmp_path / ("x" * 252 + ".pt"))
    assert look(path).said.why == "its family"
