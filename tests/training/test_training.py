"""Training: the losses by hand, the loop, resuming, several processes."""

import csv
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_example
from conftest import TINY, fill
from safetensors.torch import load_file
from torch import nn

import sd
from sd.config import SD_V1
from sd.runtime.saving import save_model
from sd.sampling.schedule import add_noise, alphas_cumprod
from sd.training.ema import AveragedWeights
from sd.training.jobs import fresh_networks, standardise
from sd.training.loop import TrainingRun
from sd.training.losses import (
    AutoencodingLoss,
    DenoisingLoss,
    draw,
    kl_divergence,
    roughness,
    snr_weights,
    standardise_latents,
)

TABLE = alphas_cumprod(SD_V1.schedule)


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


def batch():
    draws = draw(0, 0, (3, 4, 8, 8), 1000, 0.0)
    return draws.latent_noise, torch.zeros(3, 77, dtype=torch.int64), draws.timesteps, draws.noise


class Fixed(nn.Module):
    """A network with a fixed output."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *_):
        return self.answer


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_right_answer_has_no_loss_and_zero_the_mean_square_of_the_target(prediction):
    latents, tokens, timesteps, noise = batch()
    bars = TABLE[timesteps][:, None, None, None]
    target = noise if prediction == "eps" else bars.sqrt() * noise - (1 - bars).sqrt() * latents
    right = DenoisingLoss(Fixed(target), Fixed(None), TABLE, prediction=prediction)
    silent = DenoisingLoss(Fixed(torch.zeros_like(noise)), Fixed(None), TABLE, prediction=prediction)
    assert right(latents, tokens, timesteps, noise).item() == pytest.approx(0, abs=1e-12)
    assert silent(latents, tokens, timesteps, noise).item() == pytest.approx((target**2).mean().item())


def test_the_network_sees_the_noisy_latents_of_its_timestep():
    latents, tokens, timesteps, noise = batch()
    seen = []

    class Seeing(nn.Module):
        def forward(self, x_t, timestep, context):
            seen.append((x_t, timestep, context))
            return torch.zeros_like(x_t)

    DenoisingLoss(Seeing(), Fixed("context"), TABLE)(latents, tokens, timesteps, noise)
    ((x_t, timestep, context),) = seen
    for i in range(3):
        assert torch.allclose(x_t[i], add_noise(latents[i], noise[i], TABLE[timesteps[i]]))
    assert torch.equal(timestep, timesteps)
    assert context == "context"


def test_min_snr_weights_by_hand():
    # alpha_bar 0.9: SNR 9, beyond gamma 5; alpha_bar 0.5: SNR 1, below
    bars = torch.tensor([0.9, 0.5])
    assert snr_weights(bars, 5.0, 0.0, "eps").tolist() == pytest.approx([5 / 9, 1])
    assert snr_weights(bars, 5.0, 0.0, "v").tolist() == pytest.approx([5 / 10, 1 / 2])
    # alpha_bar 0.01: SNR 1/99; with a floor of 0.2, the loss in x_0 has that weight, and the loss in eps 0.2 * 99
    assert snr_weights(torch.tensor([0.01, 0.5]), 5.0, 0.2, "eps").tolist() == pytest.approx([0.2 * 99, 1])


def test_kl_divergence_is_the_closed_form():
    # N(1, 4) from N(0, 1): 0.5 * (1 + 4 - 1 - ln 4)
    assert kl_divergence(torch.tensor([1.0]), torch.tensor([4.0]).log()).item() == pytest.approx(
        0.5 * (4 - math.log(4))
    )
    assert kl_divergence(torch.zeros(3), torch.zeros(3)).item() == 0


def test_draws_depend_on_seed_and_step_and_drop_their_share():
    first, again, later = (draw(3, step, (4000, 1, 1, 1), 1000, 0.1) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.noise, later.noise)
    assert first.dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert first.timesteps.bincount().tolist() == [4] * 1000
    assert len(set(draw(3, 5, (250, 1, 1, 1), 1000, 0.1).timesteps.tolist())) == 250


def test_standardised_latents_have_unit_variance_and_the_same_pictures():
    vae = fill(TINY)["vae"]
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, logvar = vae.encode(images)
        before = vae.decode(mean)
        standardise_latents(vae, mean, 0.18215)
        scaled, scaled_logvar = vae.encode(images)
        after = vae.decode(scaled)
        latents = 0.18215 * scaled
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(after, before, atol=1e-3)
    # the spread of one latent shrinks or grows with the spread of all
    ratio = (0.5 * (scaled_logvar - logvar)).exp()
    expected = (scaled.std((0, 2, 3)) / mean.std((0, 2, 3)))[:, None, None]
    assert torch.allclose(ratio, expected.expand_as(ratio), rtol=1e-3)


def test_standardising_looks_at_many_batches():
    vae = fill(training_example.CONFIG)["vae"]
    pictures = training_example.RandomPictures()
    standardise(vae, pictures, 0.5, batches=3, batch_size=4)
    with torch.no_grad():
        means = torch.cat([vae.encode(pictures.batch(step, 4, slice(0, 4))[0])[0] for step in range(3)])
    assert torch.allclose(0.5 * means.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-2)


def test_average_follows_the_warm_up_rule():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = AveragedWeights(module, 0.9)
    expected = 0.0
    for update in range(1, 200):
        module.weight.data.fill_(float(update))
        average.update(module)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_are_applied_and_taken_out_again():
    module = nn.Linear(2, 1)
    average = AveragedWeights(module, 0.9)
    module.weight.data += 1
    plain = module.weight.detach().clone()
    with average.applied(module):
        assert torch.allclose(module.weight, plain - 1)
    assert torch.equal(module.weight, plain)


def test_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    options = replace(training_example.options(100), warmup=10, learning_rate=1.0, final_learning_rate=0.1)
    run = TrainingRun(nn.Linear(1, 1), None, options, tmp_path)
    rates = [run.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert [rates[10], rates[55], rates[99]] == pytest.approx([1.0, 0.55, 0.1], abs=1e-3)


def rows(folder):
    with open(folder / "loss.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def losses_and_state(folder: Path):
    return [row["loss"] for row in rows(folder)], load_file(folder / "state.safetensors")


def assert_same_training(first: Path, second: Path):
    (our_losses, ours), (their_losses, theirs) = map(losses_and_state, (first, second))
    assert our_losses == their_losses
    assert set(ours) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


class Halving(nn.Module):
    """An autoencoder for pictures of any size: a latent is the mean of 8x8 pixels, a pixel what its latent says."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode(self, image):
        mean = nn.functional.avg_pool2d(image, 8)
        return mean, torch.full_like(mean, -100.0)

    def decode(self, latents):
        self.seen.append(latents)
        return latents.repeat_interleave(8, -1).repeat_interleave(8, -2)


def test_what_the_autoencoder_is_asked_for_by_hand():
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def loss(**options):
        vae = Halving()
        return AutoencodingLoss(vae, kl_weight=0.0, **options)(image, noise), vae.seen

    def error(latents, picture):
        difference = latents.repeat_interleave(8, -1).repeat_interleave(8, -2) - picture
        return difference.abs().mean() + difference.square().mean()

    mean = nn.functional.avg_pool2d(image, 8)
    plain, (latents,) = loss()
    assert torch.allclose(latents, mean, atol=1e-6)
    assert plain.item() == pytest.approx(error(mean, image).item(), rel=1e-5)
    stricter, _ = loss(squared=5.0)
    squares = (mean.repeat_interleave(8, -1).repeat_interleave(8, -2) - image).square().mean()
    assert (stricter - plain).item() == pytest.approx(4 * squares.item(), rel=1e-5)
    noisy, (latents,) = loss(noise=0.1)
    assert torch.allclose(latents, mean + 0.1 * mean.std(dim=(0, 2, 3), keepdim=True) * noise, atol=1e-6)
    smooth, _ = loss(smooth=0.25)  # these latents are the shrunk picture
    assert smooth.item() == pytest.approx(plain.item(), rel=1e-6)
    assert noisy > 0


class Rough(Halving):
    """Every other latent has the other sign."""

    def encode(self, image):
        mean, logvar = super().encode(image)
        signs = (-1.0) ** torch.arange(mean.shape[-1])
        return signs * mean, logvar


def test_latents_rougher_than_the_shrunk_picture_cost_what_they_are_rougher():
    """Brightness from left to right: its neighbours are alike, and with other signs they are not."""
    image = torch.linspace(0.5, 1, 32).expand(2, 3, 32, 32)
    mean = nn.functional.avg_pool2d(image, 8)
    more = roughness((-1.0) ** torch.arange(4) * mean) - roughness(mean)
    losses = [
        AutoencodingLoss(Rough(), kl_weight=0.0, smooth=weight)(image, torch.zeros_like(mean)) for weight in (0, 0.25)
    ]
    assert more > 1
    assert (losses[1] - losses[0]).item() == pytest.approx(0.25 * more.item(), rel=1e-5)


def test_roughness_is_of_neighbours_within_pictures():
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for c in range(2):
        variance = sum(x[i, c].var().item() for i in range(3)) / 3
        down = [(x[i, c, y, k] - x[i, c, y + 1, k]).item() ** 2 for i in range(3) for y in range(3) for k in range(5)]
        across = [(x[i, c, y, k] - x[i, c, y, k + 1]).item() ** 2 for i in range(3) for y in range(4) for k in range(4)]
        total += (sum(down) / len(down) + sum(across) / len(across)) / variance / 2
    assert roughness(x).item() == pytest.approx(total, rel=1e-5)
    assert roughness(7 * x + 100 * torch.arange(3)[:, None, None, None]).item() == pytest.approx(total, rel=1e-3)
    assert roughness(torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))).item() == pytest.approx(
        4, rel=0.05
    )


@pytest.mark.slow
def test_training_lowers_the_loss_and_writes_it_down(tmp_path):
    module = AutoencodingLoss(fresh_networks(training_example.CONFIG, 0)["vae"])
    image = training_example.RandomPictures().batch(0, 4, slice(0, 4))[0]
    options = training_example.options(30)
    run = TrainingRun(module, lambda step: (image, torch.zeros(4, 4, 4, 4)), options, tmp_path)
    losses = [row["loss"] for row in run.run()]
    assert losses[-1] < 0.7 * losses[0]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 31))
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(losses)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_training_in_two_parts_is_training_in_one_whoever_makes_the_batches(tmp_path):
    list(training_example.run(tmp_path / "whole", 8).run())
    for folder, workers in (("parts", 0), ("helped", 2)):
        list(training_example.run(tmp_path / folder, 3, workers=workers).run())
        list(training_example.run(tmp_path / folder, 8, workers=workers).run())
        assert_same_training(tmp_path / "whole", tmp_path / folder)


@pytest.fixture
def one_thread():
    """As in the other processes: the number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(*arguments, **environment):
    script = Path(training_example.__file__)
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_killed_training_continues_with_the_identical_state(tmp_path):
    list(training_example.run(tmp_path / "whole", 9).run())
    child = example(tmp_path / "killed", 9)
    for line in child.stdout:
        if line.strip() == "7":  # two steps after the last save
            child.send_signal(signal.SIGKILL)
            break
    child.communicate()
    assert losses_and_state(tmp_path / "killed")
    list(training_example.run(tmp_path / "killed", 9).run())
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 10))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_global_batch(tmp_path):
    list(training_example.run(tmp_path / "one", 6).run())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    children = [example(tmp_path / "two", 6, RANK=str(rank), **common) for rank in range(2)]
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    assert losses_and_state(tmp_path / "two")[0] == pytest.approx(losses_and_state(tmp_path / "one")[0], rel=1e-4)


def test_a_state_of_other_options_or_another_model_is_refused(tmp_path):
    def begin(module=None, options=None, **settled):
        module, options = module or nn.Linear(1, 1), options or training_example.options(3)
        return TrainingRun(module, None, options, tmp_path, **settled)

    first = begin(seed=1, batch_size=4, snr_floor=None)
    for value in first.trained.values():
        moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
        first.optimisers["adam"].state[value] = {"step": torch.zeros(()), **moments}
    first.save()
    begin(seed=1, batch_size=4, snr_floor=None)
    begin(seed=1, batch_size=4, snr_floor=None, new=2)  # a state saved before that setting existed
    with pytest.raises(ValueError, match="seed was 1, is 2; batch_size was 4, is 8"):
        begin(seed=2, batch_size=8, snr_floor=None)
    with pytest.raises(ValueError, match="snr_floor was None, is 1"):
        begin(seed=1, batch_size=4, snr_floor=1)
    other = replace(training_example.options(3), learning_rate=0.5)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, is 0\.5"):
        begin(options=other, seed=1, batch_size=4, snr_floor=None)
    with pytest.raises(ValueError, match="belongs to another model"):
        begin(nn.Sequential(nn.Linear(1, 1)), seed=1, batch_size=4, snr_floor=None)


def test_a_gradient_that_is_not_finite_stops_the_training(tmp_path):
    module = nn.Linear(1, 1)
    module.forward = lambda x: (module.weight * x).sum()
    run = TrainingRun(module, lambda step: (torch.tensor(math.inf),), training_example.options(3), tmp_path)
    with pytest.raises(ArithmeticError, match="the gradient of step 1 is not finite"):
        list(run.run())


@pytest.mark.parametrize("merge", [True, False])
def test_a_trained_model_is_saved_in_the_original_layout(tmp_path, merge):
    networks = fill(TINY)
    averaged = {f"unet.{name}": value + 1 for name, value in networks["unet"].named_parameters()}
    path = tmp_path / "x.ckpt"
    save_model(path, TINY, networks, averaged, step=7, dtype=torch.float16, merge=merge)
    plain = networks["unet"].out.conv.weight.half().float()
    shifted = (networks["unet"].out.conv.weight + 1).half().float()
    loaded = sd.load(path, precision="fp32")
    assert torch.equal(loaded.unet.out.conv.weight, shifted if merge else plain)
    if not merge:
        assert torch.equal(sd.load(path, precision="fp32", weights="ema").unet.out.conv.weight, shifted)
