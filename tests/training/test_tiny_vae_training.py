"""Distilling a VAE into a tiny one: the loss by hand, what the VAE is asked, resuming, the file, and the script."""

from dataclasses import replace

import distil_vae
import pytest
import score_tiny_vae
import torch
import training_example
from conftest import pixels, settings
from diffusers import AutoencoderTiny
from oracles import relative_error
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_command import run

import sd
from convert.files.reader import open_checkpoint
from convert.tiny_vae import read_tiny_vae
from sd.config import TAESD
from sd.networks.tiny_vae import Block
from sd.pipeline.image.tensors import to_images
from sd.runtime.tiny_vae import save_tiny_vae
from sd.training.tiny_vae import DistillationLoss, answers_in, ask_vae, distillation_run, fresh_tiny_vae

NARROW = replace(TAESD, width=4)
HALVES = ("decoder", "encoder")


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


def request(prompt):
    return settings(prompt=prompt, width=64, height=64, steps=2, seed=ord(prompt), sampler="dpmpp_2m")


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "answers.safetensors"
    requests, drawn, asked = [request(text) for text in "abc"], training_example.RandomPictures(64), []
    ask_vae(
        *(model, drawn, 3, requests, path),
        **{"scale": 0.5, "batch_size": 2, "on_answer": lambda: asked.append(1), "made_of": "three and three"},
    )
    assert len(asked) == 3 + 2 * 3
    return path


def test_the_loss_of_a_step_in_brightness_is_the_one_by_hand():
    made, wanted = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.5, 1.0], [0.5, 1.0]]]])
    loss = DistillationLoss(nn.Identity(), edge_weight=2.0)(made, wanted)
    assert loss.item() == pytest.approx(0.75 + (0.25 + 1) / 2 + 2 * 0.5)  # edges: 0.5 to the right, none down


def test_a_fresh_block_passes_its_input_on():
    x = torch.rand(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    blocks = [module for module in fresh_tiny_vae(NARROW, 0).modules() if isinstance(module, Block)]
    assert len(blocks) == 20
    assert all(torch.equal(block(x), x) for block in blocks)
    assert all(block.conv1.weight.std() > 0.1 for block in blocks)


def test_the_vae_answers_for_drawn_pictures_and_for_every_step_of_the_model(model, answers):
    found = answers_in(answers, "three and three")
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "pictures": (3, 3, 64, 64),
        "latents": (9, 4, 8, 8),
        "decoded": (9, 3, 64, 64),
    }
    image = torch.cat([training_example.RandomPictures(64).batch(i, 1, slice(0, 1))[0] for i in range(3)])
    assert (found["pictures"] / 127.5 - 1 - image.clamp(-1, 1)).abs().max() < 1.001 / 255  # half a step of 8 bits
    mean = model.vae.encode(image)[0]
    assert relative_error(found["latents"][:3], 0.5 * mean) < 1e-5
    finished = model.make([request("c")])
    pictures = to_images(found["decoded"] / 127.5 - 1)
    for picture, expected in ((pictures[-1], finished[0]), (pictures[0], to_images(model.vae.decode(mean[:1]))[0])):
        assert abs(pixels(picture) - pixels(expected)).max() <= 1  # rounding to 8 bits
    with pytest.raises(ValueError, match=r"holds other pictures \(three and three\) than requested \(four\)"):
        answers_in(answers, "four")


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_a_half_learns_and_goes_on_where_it_stopped(answers, tmp_path, half):
    found = answers_in(answers, "three and three")

    def trained(folder, *stops):
        for steps in stops:
            tiny_vae = fresh_tiny_vae(NARROW, 0)
            options = replace(training_example.options(steps), learning_rate=3e-3, final_learning_rate=3e-3)
            run = distillation_run(tiny_vae, half, found, options, tmp_path / folder, batch_size=2, seed=0)
            losses = [row["loss"] for row in run.run()]
        return losses, load_file(tmp_path / folder / "state.safetensors")

    losses, state = trained("whole", 20)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    again = trained("stopped", 8, 20)[1]
    assert all(torch.equal(state[name], value) for name, value in again.items())
    assert {name.split(".")[1] for name in state if name.startswith("weights.")} == {"network"}


def test_the_file_is_read_by_diffusers_and_by_us(tmp_path):
    tiny_vae, path = fresh_tiny_vae(NARROW, 1), tmp_path / "x.safetensors"
    save_tiny_vae(path, tiny_vae)
    with open_checkpoint(path) as file:
        found = read_tiny_vae(file)
    assert (found.config.width, found.halves, found.layout) == (4, ("decoder", "encoder"), "diffusers")
    theirs = AutoencoderTiny(encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4)
    state = load_file(path)
    assert {value.dtype for value in state.values()} == {torch.float16}
    theirs.load_state_dict(state)
    tiny_vae = tiny_vae.half().float()
    latents = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    assert relative_error(tiny_vae.decode(latents), theirs.decode(latents).sample) < 1e-5
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(4))
    assert relative_error(tiny_vae.encode(image), theirs.encode(image).latents) < 1e-5


@pytest.mark.parametrize(
    ("flag", "value", "lowest"),
    [("--width", "0", 1), ("--drawn", "0", 1), ("--predicted", "-1", 0), ("--encoder-steps", "0", 1)],
)
def test_a_number_out_of_range_is_refused_before_anything_is_read(flag, value, lowest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["distil_vae.py", str(tmp_path / "x"), flag, value])
    with pytest.raises(SystemExit) as ended:
        run(distil_vae.main)
    said = capsys.readouterr().err
    assert (ended.value.code, said) == (2, f"distil_vae: {flag} {value} is out of range: {lowest} or more.\n")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_script_distils_the_embedded_model_and_finishes_what_was_begun(tmp_path, capsys):
    folder = tmp_path / "small"
    short = [
        str(folder),
        "--width",
        "4",
        "--drawn",
        "3",
        "--predicted",
        "2",
        "--batch-size",
        "2",
        "--sample-every",
        "2",
    ]
    distil_vae.main([*short, "--decoder-steps", "2", "--encoder-steps", "2"])
    assert capsys.readouterr().out == f"{folder / 'small.safetensors'}\n"
    before = load_file(folder / "small.safetensors")
    distil_vae.main([*short, "--decoder-steps", "2", "--encoder-steps", "2"])
    assert all(torch.equal(before[name], value) for name, value in load_file(folder / "small.safetensors").items())
    trained = load_file(folder / "decoder" / "state.safetensors")["ema.network.conv_in.weight"]
    assert torch.equal(before["decoder.layers.0.weight"], trained.half())
    (picture,) = sd.load(tiny_vae=folder / "small.safetensors").txt2img("a red circle", steps=1, seed=1)
    assert picture.size == (128, 128)
    assert {path.name for path in (folder / "decoder").glob("*.png")} == {"samples-000002.png"}
    options = ["--drawn", "2", "--repeats", "0", "--relations", "1", "--steps", "2"]
    score_tiny_vae.main([str(tmp_path / "scores"), "--tiny-vae", str(folder / "small.safetensors"), *options])
    rows = [line.split(" | ") for line in (tmp_path / "scores" / "scores.md").read_text().splitlines()[2:]]
    assert [[row[0].removeprefix("| "), row[1]] for row in rows] == [
        *(["drawn", "2"], ["two things", "5"], ["two things, half-way", "5"])
    ]
    assert all(3 < float(row[3].removesuffix(" dB")) <= float(row[2].removesuffix(" dB")) < 40 for row in rows)
    assert Image.open(tmp_path / "scores" / "two-things-half-way.png").size == (640, 256)
    with pytest.raises(ValueError, match=r"holds other pictures .* than requested"):
        distil_vae.main([*short, "--seed", "1", "--decoder-steps", "2", "--encoder-steps", "2"])
