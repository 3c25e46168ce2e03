"""Pictures decoded by a tiny VAE: what is made, noted, found again and refused."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assemble, final, pixels, refused, settings, settings_of
from PIL import Image
from safetensors.torch import save_file
from tiny_vaes import original, theirs, written

import sd
from sd.config import SDXL
from sd.pipeline.image.tensors import to_images
from sd.pipeline.step_previews import step_pictures
from sd.runtime.low_memory import tiled_vae
from sd.runtime.tiny_vae import load_tiny_vae

COMMON = ("--steps", "2", "--seed", "1", "-W", "64", "-H", "64")


@pytest.fixture
def file(tmp_path):
    return written(tmp_path, "taesd_decoder.safetensors")


@pytest.fixture
def loaded(tiny_ckpt, file):
    return sd.load(tiny_ckpt, tiny_vae=file)


def test_the_picture_is_the_one_that_diffusers_decodes_from_the_same_latents(loaded):
    latents = final(loaded, [settings(width=64, height=96)])
    (picture,) = loaded.txt2img(**{**settings(width=64, height=96).to_dict(), "prompt": settings().prompt})
    (expected,) = to_images(theirs().decode(latents).sample)
    assert picture.size == (64, 96)
    assert abs(pixels(picture) - pixels(expected)).max() <= 1
    assert pixels(expected).std() > 10


def test_a_model_whose_latents_have_means_gives_them_by_the_usual_scale(tiny_networks, file):
    vae = {"latent_scale": 0.5, "latent_means": (1.0, 2.0, 3.0, 4.0), "latent_deviations": (2.0, 3.0, 4.0, 5.0)}
    config = replace(TINY, family="sdxl", vae=replace(TINY.vae, **vae))
    model = assemble(config, tiny_networks)
    load_tiny_vae(file, model, torch.float32)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    means, deviations = (torch.tensor(vae[name])[:, None, None] for name in ("latent_means", "latent_deviations"))
    of_xl = (latents / 0.5 * deviations + means) * SDXL.vae.latent_scale
    assert abs(pixels(model.decode(latents)[0]) - pixels(to_images(theirs().decode(of_xl).sample)[0])).max() <= 1


def test_step_pictures_of_both_kinds_are_decoded_by_it(loaded):
    latents = final(loaded, [settings()])
    (picture,) = loaded.decode(latents)
    for kind in ("fast", "vae"):
        (frame,) = step_pictures(loaded, [latents[0]], picture, kind)
        assert (pixels(frame) == pixels(picture)).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"low_memory": True}, {"tiled_vae": True}, {"precision": "bf16"}])
def test_it_runs_with_every_option(tiny_ckpt, file, loaded, options, monkeypatch):
    monkeypatch.setattr(tiled_vae, "decode_tiled", None)  # it is not cut into tiles
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    (expected,), (given,) = loaded.decode(latents), sd.load(tiny_ckpt, tiny_vae=file, **options).decode(latents)
    assert abs(pixels(expected) - pixels(given)).mean() <= (3 if "precision" in options else 0)


def test_a_seamless_picture_goes_on_at_its_opposite_edge(loaded):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    rolled = latents.roll((3, 2), (2, 3))
    (one,), (other,) = loaded.decode(latents, "xy"), loaded.decode(rolled, "xy")
    assert abs(pixels(one) - pixels(other.transform(other.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, 0)))).max() > 1
    moved = torch.from_numpy(pixels(one)).roll((24, 16), (0, 1)).numpy()
    assert abs(moved - pixels(other)).max() <= 1


def test_one_that_overflows_is_run_again_in_fp32(tiny_ckpt, file):
    model, said = sd.load(tiny_ckpt, tiny_vae=file, precision="fp16"), []
    model.tiny_vae.decoder.conv_out.weight.mul_(3e4)
    model.txt2img("a horse", steps=1, seed=1, width=64, height=64, on_retry=said.append)
    assert said == ["the tiny VAE gave NaN or infinite values in fp16; retrying in fp32; the network stays in fp32"]
    assert (model.dtypes["vae"], model.dtypes["tiny_vae"]) == (torch.float16, torch.float32)


@pytest.mark.slow
def test_a_picture_notes_it_and_is_made_again(run, tiny_ckpt, file, tmp_path):
    code, (path,), err = run("txt2img", "a horse", "-m", tiny_ckpt, "--tiny-vae", file, *COMMON, "--tiled-vae")
    assert code == 0
    assert "decoding with the tiny VAE taesd_decoder.safetensors (whole: --tiled-vae is only for the VAE)" in err
    noted = settings_of(path)["model"]["tiny_vae"]
    assert noted["name"] == "taesd_decoder.safetensors"
    assert len(noted["sha256"]) == 64
    with Image.open(path) as picture:
        assert f"VAE Decoder: TAESD, Tiny VAE hash: {noted['sha256'][:10]}" in picture.text["parameters"]
    assert [line for line in run("show", path)[1] if "tiny VAE" in line] == [
        f"{'tiny VAE:':<20} taesd_decoder.safetensors",
        f"{chr(39).join(['tiny VAE', 's sha256:']):<20} {noted['sha256']}",
    ]
    code, (again,), err = run("txt2img", "--like", path, "-m", tiny_ckpt, "-o", "again.png")
    assert code == 0
    assert (pixels(Image.open(again)) == pixels(Image.open(path))).all()
    file.rename(tmp_path / "elsewhere.safetensors")
    err = run("txt2img", "--like", path, "-m", tiny_ckpt, "-o", "without.png")[2]
    assert f"was made with the tiny VAE taesd_decoder.safetensors, {noted['sha256']}: give it with --tiny-vae" in err


@pytest.mark.slow
def test_img2img_encodes_with_the_vae(run, tiny_ckpt, file):
    Image.new("RGB", (64, 64), (200, 30, 30)).save("init.png")
    flags = ("-m", tiny_ckpt, "--init", "init.png", "--strength", "0", *COMMON, "--tiny-vae", file)
    code, (path,), _ = run("img2img", "", *flags)
    model = sd.load(tiny_ckpt)
    latents = model.encode_image(torch.tensor([200, 30, 30])[None, :, None, None].expand(1, 3, 64, 64) / 127.5 - 1)
    assert code == 0
    (expected,) = to_images(theirs().decode(latents).sample)
    assert abs(pixels(Image.open(path)) - pixels(expected)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["taesd_decoder.pth", "folder"])
def test_a_stopped_run_does_not_take_pictures_of_the_other_decoder_for_its_own(run, tiny_ckpt, tmp_path, spelling):
    file = written(tmp_path, spelling)
    flags = ("txt2img", "a horse", "-m", tiny_ckpt, "--count", "2", *COMMON, "-o", "out/{seed}.png")
    assert len(run(*flags, "--tiny-vae", file)[1]) == 2
    assert "2 of 2 pictures exist already" in run(*flags, "--tiny-vae", file)[2]
    refused(run(*flags), "out/1.png exists already, made with other settings")


@pytest.mark.slow
def test_a_folder_that_a_picture_was_decoded_with_is_missed(run, tiny_ckpt, tmp_path):
    folder = written(tmp_path, "folder")
    (path,) = run("txt2img", "a horse", "-m", tiny_ckpt, "--tiny-vae", folder, *COMMON)[1]
    folder.rename(tmp_path / "elsewhere")
    err = run("txt2img", "--like", path, "-m", tiny_ckpt, "-o", "without.png")[2]
    assert "00001-1.png was made with the tiny VAE taesd: give it with --tiny-vae FILE" in err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["explain", *(pytest.param(c, marks=pytest.mark.slow) for c in ("bench", "noise"))])
def test_other_commands_decode_with_it(run, tiny_ckpt, file, command, monkeypatch):
    used = []
    decode = sd.networks.tiny_vae.TinyVAE.decode
    monkeypatch.setattr(sd.networks.tiny_vae.TinyVAE, "decode", lambda *given: used.append(1) or decode(*given))
    Image.new("RGB", (64, 64)).save("in.png")
    flags = {
        "explain": ("a horse", *COMMON, "--no-attention"),
        "bench": ("--sizes", "64", "--steps", "2", "--repeat", "1"),
        "noise": ("in.png", "--timesteps", "0", "-W", "64", "-H", "64"),
    }[command]
    code, lines, _ = run(command, *flags, "-m", tiny_ckpt, "--tiny-vae", file)
    assert (code, len(used) > 1) == (0, True)
    assert command != "bench" or "with the tiny VAE taesd_decoder.safetensors" in lines[0]


def test_what_cannot_decode_is_refused_before_anything_is_read(run, tiny_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", None)
    save_file(original("encoder"), tmp_path / "taesd_encoder.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"1234567890")
    make = ("txt2img", "a horse", "-m", tiny_ckpt, *COMMON)
    said = "taesd_encoder.safetensors holds only the encoder of a tiny VAE"
    refused(run(*make, "--tiny-vae", "taesd_encoder.safetensors"), said)
    refused(run(*make, "--tiny-vae", "cut.safetensors"), "cut.safetensors ")
    refused(
        run(*make, "--tiny-vae", tiny_ckpt), "tiny.ckpt is not a tiny VAE such as TAESD (it holds: Stable Diffusion 1"
    )
    refused(run(*make, "--tiny-vae", "nothere.pth"), "nothere.pth does not exist")
    refused(run(*make, "--taesd", "x.pth"), "--tiny-vae")
    refused(run("depth", "in.png", "-m", tiny_ckpt, "--tiny-vae", "x"), "--tiny-vae")


@pytest.mark.parametrize("spelling", ["taesd_decoder.pth", "folder"])
def test_it_is_no_checkpoint_and_no_vae(run, tiny_ckpt, tmp_path, spelling):
    file = written(tmp_path, spelling)
    for flags in (("-m", file), ("-m", tiny_ckpt, "--vae", file)):
        refused(run("txt2img", "a horse", *flags, *COMMON), "is a TAESD, a tiny VAE", "give it with --tiny-vae FILE")


def test_inspect_lists_its_use(run, file, tmp_path):
    save_file(original("encoder"), tmp_path / "taesd_encoder.safetensors")
    lines = run("inspect", file, "taesd_encoder.safetensors")[1]
    assert [line.partition("MB")[2].strip() for line in lines[1:]] == [
        "--tiny-vae, the decoder",
        "no: it is the encoder, and pictures are decoded with the other half, taesd_decoder",
    ]
    page = "\n".join(run("inspect", file)[1])
    assert "  usable       --tiny-vae, the decoder" in page
    assert "nothing in the file tells whether it is for Stable Diffusion 1 and 2 or for XL" in page
    assert json.loads(run("inspect", "--json", file)[1][0])["tiny_vae"] == ["decoder"]
