"""Adapters and learned words of Stable Diffusion XL as a user meets them."""

import json
from pathlib import Path

import make_checkpoint
import pytest
from adapters import lora, lora_shapes
from browser import data_of
from conftest import refused, settings_of
from embeddings import made_up
from PIL import Image
from safetensors.torch import save_file

from convert.layouts.adapter_names import adapted_family
from sd.config import SDXL, SDXL_REFINER

SMALL = ["-W", "64", "-H", "64", "--steps", "2", "--seed", "7"]
FAMILY = adapted_family(make_checkpoint.tiny(SDXL))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("xl", SDXL), ("refiner", SDXL_REFINER)):
        state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(family))
        save_file({name: value.contiguous() for name, value in state.items()}, folder / f"{name}.safetensors")
    lora(folder / "detail.safetensors", lora_shapes(FAMILY, conv=True))
    save_file({"clip_l": made_up(2, 64), "clip_g": made_up(2, 64, 1)}, folder / "easy.safetensors")
    save_file({"emb_params": made_up(2, 768)}, folder / "old.safetensors")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.slow
def test_a_picture_uses_both_and_notes_them(files, run):
    use = ["-m", files["xl"], "--lora", f"{files['detail']}:0.5", "--embeddings", files["easy"], *SMALL]
    code, (path,), err = run("txt2img", "a easy cat", *use)
    assert code == 0
    assert "lora detail: 343 modules (307 UNet, 18 text encoder, 18 second text encoder)" in err
    assert "embedding easy: 2 vectors" in err
    made = settings_of(path)
    assert [made["adapters"][0]["name"], made["embeddings"][0]["name"]] == ["detail", "easy"]
    plain = Image.open(run("txt2img", "a easy cat", "-m", files["xl"], *SMALL)[1][0])
    assert plain.tobytes() != Image.open(path).tobytes()


@pytest.mark.parametrize(
    ("model", "use", "said"),
    [
        (
            "refiner",
            ["--lora", "detail"],
            "is an adapter for Stable Diffusion XL; the model is Stable Diffusion XL refi",
        ),
        (
            "xl",
            ["--embeddings", "old"],
            "is for Stable Diffusion 1 (vectors of 768 numbers); this model is sdxl (64 and",
        ),
    ],
)
def test_what_is_for_other_models_is_said(files, run, model, use, said):
    flag, name = use
    result = run("txt2img", "a old cat", "-m", files[model], flag, files[name], *SMALL)
    assert said in refused(result)


@pytest.mark.slow
def test_explain_shows_what_each_word_attends_to(files, run):
    use = ["-m", files["xl"], "--lora", files["detail"], "--embeddings", files["easy"], *SMALL]
    code, (path,), err = run("explain", "a easy cat", *use)
    assert code == 0, err
    text = Path(path).read_text(encoding="utf-8")
    data = data_of(text)
    assert "for zeros, which stand for the empty prompt" in text
    assert sum(each["layers"] for each in data["resolutions"]) == 22


@pytest.mark.slow
def test_bench_measures_it_with_an_adapter(files, run):
    code, (line,), _ = run("bench", "-m", files["xl"], "--lora", files["detail"], "--sizes", "64", "--json")
    told = json.loads(line)
    assert (code, told["model"]["family"], told["model"]["lora"]) == (0, "sdxl", ["detail:1"])
    assert all(told[part]["median"] > 0 for part in ("load", "text"))
    assert told["cases"][0]["step"]["median"] > 0


def test_inspect_says_how_to_use_them(files, run):
    _, out, _ = run("inspect", files["detail"])
    assert "  usable       with a Stable Diffusion XL model: --lora detail" in out
    save_file({"clip_l": made_up(2, 768), "clip_g": made_up(2, 1280)}, "word.safetensors")
    _, out, _ = run("inspect", "word.safetensors")
    assert "  usable       with a Stable Diffusion XL model: word in a prompt, --embeddings word.safetensors" in out
