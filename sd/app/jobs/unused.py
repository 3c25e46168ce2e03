"""What is said before a run of what its request asks for, and that has no effect, no point, or a wrong one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convert.errors import shown
from convert.families.few_step_names import known_by_hash
from sd.app.jobs.adapters import Adapters, are_consistent, misread, objections
from sd.app.jobs.model import made_with
from sd.app.jobs.model_folder import difference
from sd.app.jobs.request import Events, ModelRequest
from sd.app.jobs.vocabulary import embedded_model_knows
from sd.pipeline.settings import Settings
from sd.sampling.names import objection

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from sd.pipeline.stable_diffusion import StableDiffusion


def vae_problems(request: ModelRequest, model: "StableDiffusion") -> list[str]:
    """What is to be said of the VAEs of a model, found by trial."""
    found = []
    if request.vae or model.config.unet.vector_width:
        from sd.runtime.vae_trial import vae_warning

        if problem := vae_warning(model):
            found.append(f"{shown((request.vae or request.file).name)}: {problem}")
    if request.tiny_vae:
        from sd.runtime.vae_trial import tiny_vae_warning

        if problem := tiny_vae_warning(model):
            found.append(f"{shown(request.tiny_vae.name)}: {problem}")
    return found


def warn_of_unused(
    request: ModelRequest,
    jobs: Sequence[Settings],
    checkpoint: "Checkpoint",
    adapters: Adapters,
    model: "StableDiffusion",
    events: Events,
    vaes: Sequence[str] | None = None,
) -> None:
    """Say what is asked for and has no effect or no point, and what gives wrong colours.

    vaes  the result of `vae_problems`, which takes a trial, for whoever makes many runs with one model
    """
    for problem in vae_problems(request, model) if vaes is None else vaes:
        events.warn(problem)
    if problem := embedded_model_knows(request.file, jobs, [word.name for word in model.words]):
        events.warn(problem)
    told = checkpoint.few_steps or known_by_hash(request.file, checkpoint.config)
    for problem in (*misread(jobs), *objections(adapters, jobs, told and (shown(request.file.name), told.kind))):
        events.warn(problem)
    if changed := difference(made_with(request, "model"), request.file, model.source.sha256):
        events.warn(f"{request.like} was {changed}")
    for part, used in (("vae", model.source.vae), ("tiny_vae", model.source.tiny_vae)):
        vae, kind = made_with(request, "model").get(part), part.replace("vae", "VAE").replace("_", " ")
        if isinstance(vae, dict) and (used is None or vae.get("sha256") != used.sha256()):
            what = f"{kind} {vae.get('name')}" + (f", {vae['sha256']}" if vae.get("sha256") else "")
            events.warn(f"{request.like} was made with the {what}: give it with --{part.replace('_', '-')} FILE")
    noise = made_with(request, "model").get("noise")
    if noise and noise != model.source.beside.get("noise"):
        events.warn(
            f"{request.like} was made with the noise levels {noise} of a .yaml beside its model, which is gone."
        )
    reuses, merges = any(job.reuse_features > 1 for job in jobs), any(job.merge_tokens for job in jobs)
    for flag, used in (("--reuse-features", reuses), ("--merge-tokens", merges)):
        if model.runner.options.compile and used:
            events.warn(f"--compile does nothing for pictures with {flag}, which changes the inside of the network.")
    negative = [job for job in jobs if job.negative_prompt or job.negative_prompt_2]
    if negative and model.config.unet.guidance_width:
        events.warn("the negative prompt is not used: this model takes the guidance scale as an input instead.")
    elif any(not job.guided for job in negative):
        events.warn("--guidance-scale 1 turns guidance off, and the negative prompt with it.")
    consistent = told is not None and told.kind.consistent
    distilled = [job for job in jobs if job.sampler in ("lcm", "tcd") and (consistent or are_consistent(adapters, job))]
    plain = [job for job in jobs if job not in distilled]
    for sampler, schedule in dict.fromkeys((job.sampler, job.schedule) for job in plain):
        if reason := objection(sampler, schedule):
            events.warn(f"--sampler {sampler} {reason}.")
