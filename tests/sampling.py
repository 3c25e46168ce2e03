"""What the sampler tests share: noise levels, networks that are known exactly, and runs of a sampler."""

import math
from itertools import count, pairwise

import torch
from reference import Gaussian

from sd.config import SD_V1
from sd.sampling.noise import PictureNoise
from sd.sampling.schedule import alpha_bar_of, alphas_cumprod, steps_through

TABLE = alphas_cumprod(SD_V1.schedule)
DATA = Gaussian(mean=0.7, deviation=0.4)


def best_eps(data):
    return lambda x, alpha_bar: data.eps(x, alpha_bar)


def some_network(x, alpha_bar):
    """Some smooth function of x and the noise level: nonlinear, and no steeper than a noise prediction."""
    return 0.3 * torch.sin(2 * x + 10 * alpha_bar) + 0.7 * x


def last(latents):
    *_, final = latents
    return final


def noise(seed=0):
    return PictureNoise([seed, seed + 1], (4, 8, 8))


def even_steps(steps, highest=10.0, lowest=0.1):
    """Even in log(sigma), from one noise level to another that is not 0: where orders can be measured."""
    sigmas = torch.linspace(math.log(highest), math.log(lowest), steps + 1, dtype=torch.float64).exp()
    return steps_through(TABLE, alpha_bar_of(sigmas))


def orders(errors):
    """The orders of errors, where the number of steps doubles each time."""
    return [math.log2(a / b) for a, b in pairwise(errors)]


def moments(sampler, steps, data, start=(0.0, 1.0), **options):
    """Mean and variance of what a sampler gives for normal data, exactly: it is affine in x and in each noise.

    start  mean and deviation of x
    """

    def final(x, draws):
        x = torch.tensor(x, dtype=torch.float64)
        return last(sampler(best_eps(data), x, steps, draw_noise=draws, **options))

    zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    calls = count()
    mean = final(start[0], lambda: (next(calls), zero)[1])
    drawn = next(calls)
    variance = (final(start[0] + start[1], lambda: zero) - mean) ** 2
    for i in range(drawn):
        calls = count()
        variance += (final(start[0], lambda i=i, calls=calls: one if next(calls) == i else zero) - mean) ** 2
    return mean.item(), variance.item()


def moment_error(sampler, steps, data=DATA, **options):
    """How far mean and deviation are from those of the forward process at the last noise level."""
    first, final = steps[0].alpha_bar, steps[-1].alpha_bar_prev
    start = ((first**0.5 * data.mean).item(), data.spread(first).item())
    mean, variance = moments(sampler, steps, data, start, **options)
    return abs(mean - (final**0.5 * data.mean).item()) + abs(variance**0.5 - data.spread(final).item())
