"""The formula of each sampler's step: as in its paper, with the step's numbers, and multiplied out.

Multiplying out needs no algebra: a sampler only adds multiples of latents, predictions and noise, so it runs on unit
vectors instead of tensors, and its results are the factors.

    x, x′      latents before and after the step        ᾱ, ᾱ′   share of the signal's power before and after
    ε, x̂₀      predicted noise, predicted picture       σ, σ′   sqrt((1 − ᾱ) / ᾱ)
    ε₂         the second prediction of the step        z       fresh noise
    h          ln(σ / σ′)                               ₋₁      from the previous step
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd.pipeline.settings import Settings
from sd.sampling.samplers import find_sampler
from sd.sampling.samplers.tcd import strategic_level
from sd.sampling.schedule import Step, Steps

NEGLIGIBLE = 1e-10  # factors below it are rounding
CLEAN = "x̂₀ = (x − √(1 − ᾱ) · ε)/√ᾱ"

EULER = ("x′ = √ᾱ′ · (x/√ᾱ + (σ′ − σ) · ε)",)
DOWN = ("c = η · σ′ · √(1 − σ′²/σ²)", "σ_d = √(σ′² − c²)", "ᾱ_d = 1/(1 + σ_d²)")
UP = "x′ = √(ᾱ′/ᾱ_d) · y + √(1 − ᾱ′/ᾱ_d) · z"
PLMS_STEP = "x′ = √(ᾱ′/ᾱ) · x + (√(1 − ᾱ′) − √(ᾱ′ · (1 − ᾱ)/ᾱ)) · e"
STRAIGHT = "x′ = √((1 − ᾱ′)/(1 − ᾱ)) · x + √ᾱ′ · (1 − σ′/σ) · x̂₀"
LINE = "D = x̂₀ + h/(2 · h₋₁) · (x̂₀ − x̂₀₋₁)"
DATA = "x′ = √ᾱ′ · x̂₀"
SDE = "x′ = √((1 − ᾱ′)/(1 − ᾱ)) · (σ′/σ)^η · x + √ᾱ′ · (1 − (σ′/σ)^(1 + η)) · D + √(1 − ᾱ′) · √(1 − (σ′/σ)^(2 · η)) · z"
CONSISTENCY = "y = 0.25/((10 · t)² + 0.25) · x + 10 · t/√((10 · t)² + 0.25) · x̂₀"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The formula of a sampler's step.

    lines    may use what the lines before define
    opening  the lines of the first steps, which have too little history
    last     the lines of a step that ends without noise, if they differ
    note     what the symbols do not say
    basis    whether factors belong to predicted noise ("eps") or predicted pictures ("x_0")
    """

    source: str
    lines: tuple[str, ...]
    opening: tuple[tuple[str, ...], ...] = ()
    last: tuple[str, ...] | None = None
    note: str = ""
    basis: str = "eps"


RULES = {
    "ddim": Rule(
        source="Song et al. (2021), eq. 12 and 16",
        lines=(
            "c = η · √((1 − ᾱ′)/(1 − ᾱ)) · √(1 − ᾱ/ᾱ′)",
            "x′ = √ᾱ′ · x̂₀ + √(1 − ᾱ′ − c²) · ε + c · z",
        ),
    ),
    "ddpm": Rule(
        source="Ho et al. (2020), eq. 6 and 7",
        lines=(
            "β = 1 − ᾱ/ᾱ′",
            "x′ = (√ᾱ′ · β · x̂₀ + √(1 − β) · (1 − ᾱ′) · x)/(1 − ᾱ) + √(β · (1 − ᾱ′)/(1 − ᾱ)) · z",
        ),
        basis="x_0",
    ),
    "plms": Rule(
        source="Liu et al. (2022), section 3",
        opening=(
            ("e = (ε + ε₂)/2", PLMS_STEP),
            ("e = (3 · ε − ε₋₁)/2", PLMS_STEP),
            ("e = (23 · ε − 16 · ε₋₁ + 5 · ε₋₂)/12", PLMS_STEP),
        ),
        lines=("e = (55 · ε − 59 · ε₋₁ + 37 · ε₋₂ − 9 · ε₋₃)/24", PLMS_STEP),
        note="ε₂ is predicted at the end of a first try of the step.",
    ),
    "euler": Rule(source="Karras et al. (2022), eq. 1 and 3", lines=EULER),
    "euler_a": Rule(
        source="Karras et al. (2022), eq. 3; Song et al. (2021), eq. 16",
        lines=(*DOWN, "y = √ᾱ_d · (x/√ᾱ + (σ_d − σ) · ε)", UP),
        note="Removes more noise than asked for, then adds fresh noise.",
    ),
    "heun": Rule(
        source="Karras et al. (2022), algorithm 1",
        lines=("x′ = √ᾱ′ · (x/√ᾱ + (σ′ − σ) · (ε + ε₂)/2)",),
        last=EULER,
        note="ε₂ is predicted at the end of a straight step.",
    ),
    "lms": Rule(
        source="Hairer, Nørsett & Wanner, III.5",
        opening=(EULER,),
        lines=("x′ = √ᾱ′ · (x/√ᾱ + (σ′ − σ) · e)",),
        note="e is the mean, over the step, of the polynomial through ε and up to three earlier predictions.",
    ),
    "dpm2": Rule(
        source="Lu et al. (2022), DPM-Solver-2",
        lines=("x′ = √ᾱ′ · (x/√ᾱ + (σ′ − σ) · ε₂)",),
        last=EULER,
        note="ε₂ is predicted half-way, at √(σ · σ′).",
    ),
    "dpm2_a": Rule(
        source="Lu et al. (2022), DPM-Solver-2; Song et al. (2021), eq. 16",
        lines=(*DOWN, "y = √ᾱ_d · (x/√ᾱ + (σ_d − σ) · ε₂)", UP),
        last=EULER,
        note="ε₂ is predicted half-way, at √(σ · σ_d).",
    ),
    "dpmpp_2s_a": Rule(
        source="Lu et al. (2022), DPM-Solver++, algorithm 1; Song et al. (2021), eq. 16",
        lines=(
            *DOWN,
            "y = √((1 − ᾱ_d)/(1 − ᾱ)) · x + √ᾱ_d · (1 − σ_d/σ) · x̂₀₂",
            UP,
        ),
        last=(STRAIGHT,),
        note="x̂₀₂ is predicted half-way, at √(σ · σ_d).",
        basis="x_0",
    ),
    "dpmpp_2m": Rule(
        source="Lu et al. (2022), DPM-Solver++, algorithm 2",
        opening=((STRAIGHT,),),
        lines=(LINE, "x′ = √((1 − ᾱ′)/(1 − ᾱ)) · x + √ᾱ′ · (1 − σ′/σ) · D"),
        last=(STRAIGHT,),
        basis="x_0",
    ),
    "dpmpp_sde": Rule(
        source="Lu et al. (2022), SDE-DPM-Solver++; Song et al. (2021), eq. 16",
        lines=(*DOWN, "y = √((1 − ᾱ_d)/(1 − ᾱ)) · x + √ᾱ_d · (1 − σ_d/σ) · x̂₀₂"),
        last=(STRAIGHT,),
        note="x̂₀₂ is predicted half-way, at √(σ · σ′), after a noisy step of its own; x′ is y plus fresh noise. Both "
        "noises come from one Brownian path.",
        basis="x_0",
    ),
    "dpmpp_2m_sde": Rule(
        source="Lu et al. (2022), SDE-DPM-Solver++(2M)",
        opening=(("D = x̂₀", SDE),),
        lines=(LINE, SDE),
        last=(DATA,),
        basis="x_0",
    ),
    "unipc": Rule(
        source="Zhao et al. (2023), UniPC-2",
        opening=((STRAIGHT,),),
        lines=("y = √((1 − ᾱ′)/(1 − ᾱ)) · x + √ᾱ′ · (1 − σ′/σ) · x̂₀",),
        note="x is first corrected with x̂₀; then x′ is y plus a multiple of the change of x̂₀.",
        basis="x_0",
    ),
    "lcm": Rule(
        source="Luo et al. (2023); Song et al. (2023), consistency models",
        lines=(CONSISTENCY, "x′ = √ᾱ′ · y + √(1 − ᾱ′) · z"),
        basis="x_0",
    ),
    "tcd": Rule(
        source="Zheng et al. (2024), strategic stochastic sampling",
        lines=("y = √ᾱ_s · x̂₀ + √(1 − ᾱ_s) · ε", "x′ = √(ᾱ′/ᾱ_s) · y + √(1 − ᾱ′/ᾱ_s) · z"),
        note="ᾱ_s is ᾱ at timestep (1 − η) · t′, rounded down; t′ is the timestep that the step ends at.",
    ),
}
UNIPC_3 = replace(RULES["unipc"], source="Zhao et al. (2023), UniPC-3")
RULES |= {"unipc_bh1": UNIPC_3, "unipc_bh2": UNIPC_3}
LETTERS = re.compile("x̂₀₋₁|x̂₀₂|x̂₀|h₋₁|ᾱ_d|ᾱ_s|σ_d|ᾱ′|σ′|ᾱ|σ|η|h|t")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of the step, multiplied out."""

    name: str  # "x", "ε", "x̂₀", "z", with the step it comes from if that is another: "ε (step 3)"
    factor: float


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A step of a sampler."""

    source: str
    note: str
    symbols: tuple[str, ...]
    numbers: tuple[str, ...]  # the same lines with the step's values
    terms: tuple[Term, ...]  # x′ is their sum


def formulas(settings: Settings, steps: Steps) -> list[Formula]:
    """One for each step."""
    rule, terms = RULES[settings.sampler], step_terms(settings, steps)
    found = []
    for i, step in enumerate(steps):
        lines = rule.opening[i] if i < len(rule.opening) else rule.lines
        if rule.last and step.alpha_bar_prev == 1:
            lines = rule.last
        lines = (CLEAN, *lines)
        values = step_values(settings, steps, i)
        numbers = tuple(
            LETTERS.sub(lambda match, values=values: values.get(match[0], match[0]), line) for line in lines
        )
        found.append(Formula(source=rule.source, note=rule.note, symbols=lines, numbers=numbers, terms=terms[i]))
    return found


def step_values(settings: Settings, steps: Steps, i: int) -> dict[str, str]:
    """The values of the formulas' symbols at a step, to six digits."""

    def sigma(alpha_bar: float) -> float:
        return math.sqrt((1 - alpha_bar) / alpha_bar)

    def h(step: Step) -> float | None:
        end = sigma(float(step.alpha_bar_prev))
        return math.log(sigma(float(step.alpha_bar)) / end) if end else None

    step = steps[i]
    values = {
        "ᾱ": float(step.alpha_bar),
        "ᾱ′": float(step.alpha_bar_prev),
        "σ": sigma(float(step.alpha_bar)),
        "σ′": sigma(float(step.alpha_bar_prev)),
        "t": float(step.timestep),
        "η": 0.0 if settings.eta is None else settings.eta,
        "h": h(step),
        "h₋₁": h(steps[i - 1]) if i else None,
        "ᾱ_s": float(strategic_level(steps.table, step.alpha_bar_prev, settings.eta))
        if settings.sampler == "tcd"
        else None,
    }
    return {name: f"{value:.6g}" for name, value in values.items() if value is not None}


def step_terms(settings: Settings, steps: Steps) -> list[tuple[Term, ...]]:
    """The factors of x, predictions and fresh noise in each step's x′."""
    symbols: list[tuple[str, int]] = [("x", 0)]  # kind, and the step it comes from
    now = 0

    def symbol(kind: str) -> Tensor:
        symbols.append((kind, now))
        vector = torch.zeros(
            1 + 4 * len(steps), dtype=torch.float64, device="cpu"
        )  # at most two predictions and noises a step
        vector[len(symbols) - 1] = 1
        return vector

    def predict_eps(x: Tensor, alpha_bar: Tensor) -> Tensor:
        if RULES[settings.sampler].basis == "eps":
            return symbol("ε")
        return (x - alpha_bar.sqrt() * symbol("x̂₀")) / (1 - alpha_bar).sqrt()  # the noise that implies this x̂₀

    x = torch.zeros(1 + 4 * len(steps), dtype=torch.float64, device="cpu")
    x[0] = 1
    options = {} if settings.eta is None else {"eta": settings.eta}
    sampler = find_sampler(settings.sampler)(predict_eps, x, steps, draw_noise=lambda: symbol("z"), **options)
    found = []
    for after in sampler:
        kept = after[0] / x[0]
        rest = (after - kept * x).tolist()
        terms = [Term(name="x", factor=kept.item())]
        terms += [Term(name=name_of(symbols, j, now), factor=rest[j]) for j in range(1, len(symbols))]
        found.append(tuple(term for term in terms if abs(term.factor) > NEGLIGIBLE))
        x, now = after, now + 1
    return found


def name_of(symbols: Sequence[tuple[str, int]], j: int, now: int) -> str:
    """ "ε", "ε₂" for the second of the step, "ε (step 3)" for one of another step"""
    kind, step = symbols[j]
    second = "₂" if (kind, step) in symbols[:j] else ""
    return f"{kind}{second}" + ("" if step == now else f" (step {step + 1})")
