"""What `strength` means: how many of its steps a run takes if it begins with a picture.

Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations" (2022), section 3.
"""


def steps_run(steps: int, strength: float) -> int:
    """How many of the steps run at this strength, rounded down as in the original. They are the last ones."""
    return int(steps * strength + 1e-9)  # 0.29 * 100 is 28.999...


def steps_for(run: int, strength: float) -> int:
    """The smallest number of steps of which at least `run` run at this strength, which is above 0."""
    steps = max(run, int(run / strength) - 1)
    while steps_run(steps, strength) < run:
        steps += 1
    return steps
