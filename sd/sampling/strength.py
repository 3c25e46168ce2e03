"""How many of its steps a run takes where it begins with a picture: what strength means.

Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations" (2022), section 3.
"""


def steps_run(steps: int, strength: float) -> int:
    """How many of the steps are run at this strength, the last ones: as in the original, rounded down."""
    return int(steps * strength + 1e-9)  # 0.29 * 100 is 28.999...


def steps_for(run: int, strength: float) -> int:
    """The smallest number of steps of which at least `run` are run at this strength, above 0."""
    steps = max(run, int(run / strength) - 1)
    while steps_run(steps, strength) < run:
        steps += 1
    return steps
