"""The README.md of a diffusers folder: what it says, and that no text of a stranger gets out of its place."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import make_checkpoint
import pytest
import yaml
from conftest import TINY
from hostile import look
from safetensors.torch import save_file

import sd
from convert.actions.convert import convert
from convert.actions.merge import Merging, Share
from convert.actions.model_card import CARD, code, model_card
from convert.checkpoint import Checkpoint
from convert.families.stated_config import PREDICTIONS
from convert.layouts.noise_schedule import FAMILY, RULE_OF_THUMB, Statement
from convert.published.known import find_by_name, known_checkpoints
from sd.app.cli import main
from sd.config import SDXL

SHA = "ab" * 32
OWN = {"precision": "float16", "weights": "model", "source_file": "x.safetensors", "source_sha256": SHA}


def card(config=SDXL, stated=(), own=OWN, before=(), part=None, class_name="X", why=FAMILY):
    said = Statement(prediction=config.prediction, why=why, schedule=config.schedule)
    nothing = {"names": {}, "stored_names": {}, "tensors": {}, "unknown": (), "other_weights": None}
    checkpoint = Checkpoint(
        config=config, part=part, layout="original", weights="model", said=said, global_step=None, **nothing
    )
    return model_card(checkpoint, class_name, own, dict(stated), dict(before))


def front(text):
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def plain(text):
    """A card without its YAML and without what Markdown takes for code."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "CODE", text.split("---\n", 2)[2])


@pytest.mark.parametrize("family", sd.list_models())
def test_every_family_has_its_title_task_and_example(family):
    config = sd.get_config(family)
    text = card(config)
    matter = front(text)
    assert matter["library_name"] == "diffusers"
    assert matter.keys() == {"library_name", "pipeline_tag", "tags"}
    from_text = config.unet.in_channels == 4 and family != "sdxl-refiner"
    assert matter["pipeline_tag"] == ("text-to-image" if from_text else "image-to-image")
    assert matter["tags"][:1] == ["stable-diffusion-xl" if family.startswith("sdxl") else "stable-diffusion"]
    assert ("inpainting" in matter["tags"]) == family.endswith("inpainting")
    assert f"- Family: `{family}`, for pictures of about {config.native_size}x{config.native_size} pixels\n" in text
    assert f"(`{config.prediction}`)\n" in text
    assert ("switch_at" in text) == (family == "sdxl-refiner")
    example = re.search(r"```python\n(import sd\n.*?)```", text, re.S)[1]
    compile(example, "example", "exec")
    assert ("depth=" in example) == (family == "sd-v1-depth")
    used = re.search(r"= (?:model|base)\.(\w+)", example)[1]
    assert used == {9: "inpaint", 8: "edit", 5: "depth2img", 4: "txt2img"}[config.unet.in_channels]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whatever_is_predicted_is_said(prediction):
    config = replace(SDXL, prediction=prediction, schedule=replace(SDXL.schedule, sigma_min=0.5, sigma_max=80.0))
    line = next(line for line in card(config).splitlines() if "predicts" in line)
    assert f"(`{prediction}`); at sigmas from 0.5 to 80, without timesteps" in line


IDENTIFIER = {
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
    "Stability AI Community": "other",
}


@pytest.mark.parametrize("known", [each for each in known_checkpoints() if each.sha256], ids=lambda known: known.file)
def test_a_published_file_is_told_by_its_hash(known):
    for values in ({"own": OWN | {"source_sha256": known.sha256}}, {"before": before_of(known)}):
        text = card(**values)
        matter = front(text)
        assert f"Published as [{known.file}]({known.address}): {known.about}\n" in text
        assert f"Licence: {known.licence}. " in text
        assert matter["license"] == IDENTIFIER[known.licence]
        assert known.address.startswith(f"https://huggingface.co/{matter['base_model']}/resolve/")


def before_of(known):
    """What a file of ours that was made from it states."""
    return {"format": "sd-zoo", "source_file": known.file, "source_sha256": known.sha256}


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CreativeML Open RAIL++-M License", {"license": "openrail++"}),
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("MIT", {"license": "mit"}),
        ("Fair AI Public License 1.0-SD", {"license": "other", "license_name": "Fair AI Public License 1.0-SD"}),
        ("  ", {}),
    ],
)
def test_a_stated_licence_is_named_as_the_hub_names_it(licence, expected):
    text = card(stated={"modelspec.license": licence})
    assert {name: value for name, value in front(text).items() if name.startswith("license")} == expected
    said = f"Licence, as the source states it: `{licence}`." if expected else "Licence: not stated in the source"
    assert said in text


@pytest.mark.parametrize(
    ("stated", "base"),
    [
        ({"ss_sd_model_name": "stabilityai/stable-diffusion-xl-base-1.0"}, "stabilityai/stable-diffusion-xl-base-1.0"),
        ({"ss_sd_model_name": "models/sd_xl_base.safetensors"}, None),
        ({"ss_sd_model_name": "/home/me/model"}, None),
        ({"base_model": "a/b\nlicense: mit"}, None),
        ({"modelspec.title": "owner/name"}, None),
    ],
)
def test_a_base_model_is_one_of_the_hub(stated, base):
    assert front(card(stated=stated)).get("base_model") == base


HOSTILE = [
    "x\n---\nlicense: mit\n# heading\n",
    'x"\nlicense: mit\n"',
    "`` ` ``` <script>alert(1)</script> ![](https://evil.example/x.png) [a](javascript:b)",
    "`",
    "\\`x\\`",
    "\x1b]0;title\x07\x00\x7f\x85\u2028\u202e\ufeff\ud800",
    "| a | b |\n|---|---|\n&lt;b&gt; {{ x }} ${y} !!python/object:os.system",
    "T" * (1 << 20),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_in_its_place(text):
    """Wherever text of a file or its name goes; the rest of the card is as with any other text."""

    def everywhere(text):
        names = ("title", "author", "description", "merged_from", "license")
        stated = {f"modelspec.{name}": text for name in names} | {"base_model": text, "ss_sd_model_name": text}
        stated["adapters"] = json.dumps([{"name": text, "strength": 0.5}, {"name": [text]}, text])
        stated["sd_merge_models"] = json.dumps({text: {"name": text}, "b": text})
        own = OWN | {"source_file": text, "vae_file": text, "source_files": json.dumps({text: SHA})}
        return card(stated=stated, own=own, before={"format": "sd-zoo", "source_file": text, "source_sha256": text})

    hostile, harmless = everywhere(text), everywhere("harmless")
    assert plain(hostile) == plain(harmless)
    assert len(hostile) < 10_000
    assert hostile.isprintable() or set(filter(lambda c: not c.isprintable(), hostile)) == {"\n"}
    matter, usual = front(hostile), front(harmless)
    assert matter.pop("license_name").startswith(text.strip()[0] if text.isprintable() else "")
    assert usual.pop("license_name") == "harmless"
    assert matter == usual


@pytest.mark.parametrize("text", ["a", "`a", "a``b", "``"])
def test_code_is_what_markdown_reads_back(text):
    fence = re.match("`+", code(text))[0]
    inner = code(text)[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inner)
    assert (inner[1:-1] if inner[0] == inner[-1] == " " else inner) == text


TURBO = find_by_name("sd_xl_turbo_1.0_fp16")


@pytest.mark.parametrize("own", [{"source_file": "sd_xl_turbo.safetensors"}, {"source_sha256": TURBO.sha256}])
def test_a_model_for_few_steps_has_its_settings(own):
    text = card(own=OWN | own)
    assert re.search(r"- The source is .*Turbo.*, as its (name|sha256) says, .*--steps \d+", text)
    assert "few steps" not in card()


def test_a_guess_and_what_was_added_are_said():
    text = card(sd.get_config("sd-v2"), why=RULE_OF_THUMB)
    assert "predicts the velocity (`v`); this is a guess, since nothing in the source states it" in text
    adapters = json.dumps([{"name": "detail.safetensors", "strength": 0.8}])
    text = card(own=OWN | {"vae_file": "v.ckpt", "vae_sha256": SHA}, stated={"adapters": adapters})
    assert f"VAE: from `v.ckpt`, sha256 `{SHA}`, AutoV2 `{SHA[:10]}`" in text
    assert "Adapters in the weights: `detail.safetensors` at 0.8\n" in text
    assert "Those of the VAE and the adapters apply, too." in text


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A narrow model with its publisher's metadata; a folder of it; another model."""
    folder = tmp_path_factory.mktemp("sources")
    known = {"modelspec.title": "A title", "modelspec.license": "MIT", "modelspec.hash_sha256": "0x00"}
    for seed, name in enumerate("ab"):
        save_file(make_checkpoint.made_up_state_dict(TINY, seed), folder / f"{name}.safetensors", known)
    convert(folder / "a.safetensors", folder / "folder", layout="diffusers")
    yield folder
    shutil.rmtree(folder)


def test_a_folder_gets_a_card_that_readers_pass_over(sources):
    text = (sources / "folder" / CARD).read_text()
    digest = hashlib.sha256((sources / "a.safetensors").read_bytes()).hexdigest()
    assert f"- Source: `a.safetensors`, sha256 `{digest}`, AutoV2 `{digest[:10]}`\n" in text
    assert "- Title: `A title`\n" in text
    assert "from diffusers import StableDiffusionPipeline\n" in text
    assert str(sources.parent) not in text
    assert "0x00" not in text
    (sources / "folder" / CARD).write_text("---\nlicense: [\n")
    assert look(sources / "folder").config == TINY


@pytest.mark.parametrize(
    ("part", "loader", "title"),
    [
        ("unet", "diffusers import UNet2DConditionModel", "UNet of Stable Diffusion 1"),
        ("vae", "diffusers import AutoencoderKL", "VAE of Stable Diffusion"),
        ("text_encoder", "transformers import CLIPTextModel", "text encoder of Stable Diffusion 1"),
    ],
)
def test_a_network_alone_gets_a_card_too(tmp_path, sources, part, loader, title):
    source = sources / "a.safetensors"
    convert(source, tmp_path / "alone", layout="diffusers", part=part)
    text = (tmp_path / "alone" / CARD).read_text()
    assert f"# {title}\n" in text
    assert f"from {loader}\n" in text
    assert ("predicts" in text) == (part == "unet")
    assert "pipeline_tag" not in front(text)
    convert(tmp_path / "alone", tmp_path / "back.safetensors", part=part)  # read as before
    (tmp_path / "alone" / CARD).write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        convert(source, tmp_path / "alone", layout="diffusers", part=part)
    assert (tmp_path / "alone" / CARD).read_text() == "mine"
    convert(source, tmp_path / "alone", layout="diffusers", part=part, force=True)
    assert (tmp_path / "alone" / CARD).read_text() == text


def test_a_folder_as_the_source_is_named(tmp_path, sources, monkeypatch):
    """Also where it is given as `.`; without its hashes if they are not asked for."""
    monkeypatch.chdir(sources / "folder")
    command = ["convert", ".", str(tmp_path / "x"), "--to", "diffusers", "--only", "vae", "--precision", "fp16", "-q"]
    for flags, hashed in (((), True), (("--no-hash", "--force"), False)):
        assert main([*command, *flags]) == 0
        text = (tmp_path / "x" / CARD).read_text()
        assert "- Weights: float16\n- Source: `folder`\n" in text
        assert ("- `vae/diffusion_pytorch_model.safetensors` in it: sha256 `" in text) == hashed


@pytest.mark.slow
def test_a_merge_names_its_models(tmp_path, sources):
    changing = Merging(sources / "b.safetensors", None, Share(0.5))
    convert(sources / "a.safetensors", tmp_path / "merged", layout="diffusers", changing=changing)
    text = (tmp_path / "merged" / CARD).read_text()
    assert "- Merged from: `a.safetensors` and `b.safetensors`\n" in text
    assert "Those of the other models apply, too." in text
