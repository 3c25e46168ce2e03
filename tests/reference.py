"""Slow, obvious formulas to compare the fast ones with."""

import math


def betas():
    """The 1000 variances that the forward process adds, one by one: 'scaled linear' from 0.00085 to 0.012."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    return [(low + (high - low) * i / 999) ** 2 for i in range(1000)]


def alphas_cumprod():
    product, table = 1.0, []
    for beta in betas():
        product *= 1 - beta
        table.append(product)
    return table


class Gaussian:
    """Data that is normal with a mean and a deviation, one value at a time: everything about it is known exactly.

    x_t is normal with mean sqrt(alpha_bar) * mean and variance alpha_bar * deviation**2 + 1 - alpha_bar, so the best
    prediction of eps is a linear function of x_t.
    """

    def __init__(self, mean: float, deviation: float):
        self.mean, self.deviation = mean, deviation

    def spread(self, alpha_bar):
        return (alpha_bar * self.deviation**2 + 1 - alpha_bar) ** 0.5

    def eps(self, x_t, alpha_bar):
        return (1 - alpha_bar) ** 0.5 * (x_t - alpha_bar**0.5 * self.mean) / self.spread(alpha_bar) ** 2

    def v(self, x_t, alpha_bar):
        """The best prediction of sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x_0, by regression on x_t."""
        covariance = (alpha_bar * (1 - alpha_bar)) ** 0.5 * (1 - self.deviation**2)
        distance = x_t - alpha_bar**0.5 * self.mean
        return covariance / self.spread(alpha_bar) ** 2 * distance - (1 - alpha_bar) ** 0.5 * self.mean

    def flow(self, x, alpha_bar, alpha_bar_end):
        """Where the probability flow carries x: it keeps its distance from the mean, in deviations."""
        deviations = (x - alpha_bar**0.5 * self.mean) / self.spread(alpha_bar)
        return alpha_bar_end**0.5 * self.mean + deviations * self.spread(alpha_bar_end)
