"""The picture that a run of `sd explain` begins with: which task the model is for, and what it is given."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli import depth2img, img2img
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.explaining import Beginning
from sd.app.jobs.request import JobRequest
from sd.pipeline.settings import IMAGE_GUIDANCE

if TYPE_CHECKING:
    from sd.config import ModelConfig

DEFAULTS = {
    "image to image": {"strength": img2img.STRENGTH},
    "depth to image": {"strength": depth2img.STRENGTH},
    "editing": {"image_guidance": IMAGE_GUIDANCE},
}


def add_start_flags(parser: Parser) -> None:
    add = parser.group("a picture to begin with")
    img2img.add_init_flags(add, required=False)
    add("--strength", type=float, metavar="X",
        help=f"how much of it changes, 0 to 1 (default: {img2img.STRENGTH:g}, of depth models "
        f"{depth2img.STRENGTH:g})")  # fmt: skip
    add("--depth", type=Path, metavar="IMAGE",
        help="of depth models: a map of the same shape, near is bright (default: the model estimates it)")  # fmt: skip
    add("--invert-depth", "--invert_depth", action="store_true", help="in the depth map, near is dark")
    add("--image-guidance", "--cfg-image", "--image-cfg-scale", type=float, metavar="X",
        help=f"of editing models: how much to keep to the picture (default: {IMAGE_GUIDANCE:g})")  # fmt: skip


def with_start(request: JobRequest, config: "ModelConfig") -> tuple[JobRequest, Beginning | None]:
    """The request with the task that the model is for, and the picture that it begins with, if there is one.

    Raises UsageError if the model needs a picture, or if what is given does not go with it.
    """
    from convert.families.table import CHANNELS, family_named
    from sd.app.jobs.inputs import read_inputs
    from sd.app.jobs.plan import with_settings

    tasks = family_named(config.family).tasks
    if not {"text to picture", *DEFAULTS} & set(tasks):
        raise UsageError("sd explain shows no inpainting, and this checkpoint does nothing else. Use another one.")
    if request.init is None and "text to picture" not in tasks:
        reads = f"{config.unet.in_channels} channels ({CHANNELS[config.unet.in_channels]})"
        raise UsageError(f"this checkpoint's UNet takes {reads}. Give it a picture with --init IMAGE.")
    task = "text to picture" if request.init is None else next(task for task in DEFAULTS if task in tasks)
    if request.depth is not None and task != "depth to image":
        raise UsageError("--depth goes with --init and a depth checkpoint, whose UNet takes 5 channels. Leave it out.")
    depth2img.check_depth_flags(request.depth, request.inputs.invert_depth)
    if "image_guidance" in request.settings and task != "editing":
        raise UsageError(
            "--image-guidance goes with --init and an editing checkpoint, whose UNet takes 8 channels. Leave it out."
        )
    if request.init is None:
        return request, None
    request = replace(request, task=task, settings={**DEFAULTS[task], **request.settings})
    inputs = read_inputs(request)
    inputs.check_depth(config)
    canvas = inputs.canvas(config.native_size)
    width, height = canvas.placement.working
    return with_settings(request, width=width, height=height), Beginning(inputs, canvas)
