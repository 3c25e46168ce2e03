"""What the page says a sampler does, against what it did."""

import math
import re

import pytest
import torch
from sampling import TABLE, some_network

from sd.config import SD_V1
from sd.pipeline.latent_diffusion import table_and_steps
from sd.pipeline.settings import Settings
from sd.sampling.names import SAMPLER_INFO
from sd.sampling.samplers import SAMPLERS, find_sampler
from sd.study.explain.formulas import RULES, formulas, step_terms

STEPS = 6
# their lines are only a part of what they do; the factors are still checked
PARTIAL = {"lms", "unipc", "unipc_bh1", "unipc_bh2", "dpmpp_sde"}


class Watched:
    """A run of a sampler that keeps all its inputs under the names that the formulas use."""

    def __init__(self, name, **options):
        self.settings = Settings(prompt="", width=64, height=64, seed=0, sampler=name, steps=STEPS, **options)
        _, self.steps = table_and_steps(SD_V1.schedule, self.settings)
        generator = torch.Generator().manual_seed(3)
        self.values: dict[str, torch.Tensor] = {}
        self.now = 0

        def add(name, value):
            key = f"{name}₂ {self.now}" if f"{name} {self.now}" in self.values else f"{name} {self.now}"
            self.values[key] = value
            return value

        def predict(x, alpha_bar):
            eps = add("ε", some_network(x, alpha_bar))
            add("x̂₀", (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt())
            return eps

        def draw_noise():
            return add("z", torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64))

        x = torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64)
        self.latents = [x]
        eta = {} if self.settings.eta is None else {"eta": self.settings.eta}
        for after in find_sampler(self.settings.sampler)(predict, x, self.steps, draw_noise=draw_noise, **eta):
            self.latents.append(after)
            self.now += 1

    def value(self, name, step):
        """Of "x", "ε", "ε₂", "ε (step 3)", "z"."""
        match = re.fullmatch(r"(\D+?)(?: \(step (\d+)\))?", name)
        at = step if match[2] is None else int(match[2]) - 1
        return self.latents[step] if match[1] == "x" else self.values[f"{match[1]} {at}"]


def watched_runs():
    for name, row in SAMPLER_INFO.items():
        yield name, {}
        if row.eta is not None:
            yield name, {"eta": 0.6}
    yield "ddim", {"schedule": "trailing"}  # ends without noise
    yield "plms", {"schedule": "linspace"}


RUNS = list(watched_runs())
IDS = [f"{name} {options}" for name, options in RUNS]


def test_every_sampler_has_a_rule():
    assert set(RULES) == set(SAMPLERS)


@pytest.mark.parametrize(("name", "options"), RUNS, ids=IDS)
def test_factors_make_the_next_latents_from_what_the_sampler_was_given(name, options):
    run = Watched(name, **options)
    for i, terms in enumerate(step_terms(run.settings, run.steps)):
        made = sum(term.factor * run.value(term.name, i) for term in terms)
        assert torch.allclose(made, run.latents[i + 1], rtol=1e-8, atol=1e-8), terms


def evaluated(lines, names):
    """The formulas read as arithmetic: each line defines the name on its left."""
    known = dict(names)
    for line in lines:
        left, right = line.split(" = ")
        text = right.replace("−", "-").replace("·", "*").replace("²", "**2").replace("^", "**")
        text = re.sub(r"√(\d[\d.e+-]*|\w+′?)", r"√(\1)", text).replace("√", "root")  # √0.5, √ᾱ
        for letter, name in sorted(IDENTIFIERS.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(letter, name)
        value = eval(text, {"root": root, "__builtins__": {}}, known)
        known[IDENTIFIERS.get(left, left)] = value
    return known["x_next"]


def root(value):
    return value.sqrt() if isinstance(value, torch.Tensor) else math.sqrt(max(value, 0))


IDENTIFIERS = {
    "x′": "x_next", "x̂₀₋₁": "clean_past", "x̂₀₂": "clean_second", "x̂₀": "clean", "ε₋₁": "eps_1", "ε₋₂": "eps_2",
    "ε₋₃": "eps_3", "ε₂": "eps_second", "ε": "eps", "ᾱ_d": "ab_down", "ᾱ_s": "ab_s", "σ_d": "s_down", "ᾱ′": "ab_next",
    "σ′": "s_next", "ᾱ": "ab", "σ": "s", "h₋₁": "h_past", "η": "eta", "β": "beta",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["symbols", "numbers"])
@pytest.mark.parametrize(
    ("name", "options"),
    [run for run in RUNS if run[0] not in PARTIAL],
    ids=[i for i in IDS if i.split()[0] not in PARTIAL],
)
def test_lines_read_as_arithmetic_give_the_next_latents(name, options, kind):
    run = Watched(name, **options)
    h = None
    for i, (formula, step) in enumerate(zip(formulas(run.settings, run.steps), run.steps, strict=True)):
        ab, ab_next = float(step.alpha_bar), float(step.alpha_bar_prev)
        names = {"x": run.latents[i], "eps": run.values[f"ε {i}"], "z": run.values.get(f"z {i}", torch.zeros(()))}
        for key, name_there in (("eps_second", f"ε₂ {i}"), ("clean_second", f"x̂₀₂ {i}"), ("clean_past", f"x̂₀ {i - 1}")):
            names[key] = run.values.get(name_there)
        names |= {f"eps_{back}": run.values.get(f"ε {i - back}") for back in (1, 2, 3)}
        if kind == "symbols":  # the letters are known here from their definitions
            sigma, sigma_next = (math.sqrt((1 - share) / share) for share in (ab, ab_next))
            names |= {"ab": ab, "ab_next": ab_next, "s": sigma, "s_next": sigma_next}
            names |= {"eta": run.settings.eta or 0.0, "t": float(step.timestep)}
            h_past, h = h, math.log(sigma / sigma_next) if sigma_next else None
            names |= {"h": h, "h_past": h_past}
            ends_at = float(run.steps[i + 1].timestep) if i + 1 < len(run.steps) else 0
            names |= {"ab_s": float(TABLE[math.floor((1 - names["eta"]) * ends_at)])}
        made = evaluated(getattr(formula, kind), names)
        # six digits are printed; where alpha_bar is near 1, 1 - alpha_bar has fewer
        tolerance = 1e-8 if kind == "symbols" else 5e-3
        assert torch.allclose(made, run.latents[i + 1], rtol=tolerance, atol=tolerance), formula
