"""What a UNet predicts, by trying it: for files of Stable Diffusion 2 that nothing states it of.

Its models for eps and for v have the same names and shapes. At the noisiest timestep, eps is about the input itself,
and v about the negative of the picture. The input and the limit are those of AUTOMATIC1111/stable-diffusion-webui and
of stable-diffusion.cpp, where this trial alone decides. Here the rule of thumb in `convert.layouts.noise_schedule`
comes first, since inspecting and converting a file read no more than that, and a file must not be one thing there and
another here. The trial confirms or contradicts it, and decides where it cannot be applied.
"""

from dataclasses import replace

import torch

from convert.layouts.noise_schedule import NO_GUESS, RULE_OF_THUMB, Statement, guess
from sd.pipeline.runner import undisturbed
from sd.pipeline.stable_diffusion import StableDiffusion

INPUT, SIDE, TOKENS = 0.5, 8, 2  # of latents and text alike; latents along a side; text vectors
LIMIT = -1.0


@undisturbed()
def tried(model: StableDiffusion) -> str | None:
    """What one prediction suggests: "eps" or "v"; None where it is not finite."""
    unet, config = model.unet, model.config
    device = model.runner.device(unet)
    options = {"device": device, "dtype": model.dtypes["unet"]}
    x = torch.full((1, config.vae.latent_channels, SIDE, SIDE), INPUT, **options)
    further = x.new_zeros(1, config.unet.in_channels - x.shape[1], SIDE, SIDE)
    timestep = torch.tensor(config.schedule.timesteps - 1, dtype=torch.int64, device=device)
    context = torch.full((1, TOKENS, config.unet.context_width), INPUT, **options)
    with model.runner.at_work(unet):
        difference = (unet(torch.cat([x, further], dim=1), timestep, context) - x).float().mean().item()
    return ("v" if difference < LIMIT else "eps") if abs(difference) < float("inf") else None


def warnings_after_trial(model: StableDiffusion, said: Statement) -> tuple[str, ...]:
    """The warnings of a file once its model was made; where nothing else tells, the model gets what the trial suggests.

    Costs one small prediction for a file that does not state what it predicts, nothing for others.
    """
    if not said.is_guess or (found := tried(model)) is None:
        return said.warnings
    if said.prediction is None:
        model.config = replace(model.config, prediction=found)
        new = guess(found, "by a trial prediction")
    elif found == said.prediction:
        new = guess(found, f"by {RULE_OF_THUMB} and by a trial prediction")
    else:
        new = guess(said.prediction, f"by {RULE_OF_THUMB}, and a trial prediction contradicts it")
    old = NO_GUESS if said.prediction is None else guess(said.prediction, f"by {RULE_OF_THUMB}")
    return tuple(new if warning == old else warning for warning in said.warnings)
