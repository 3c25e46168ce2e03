"""What the commands that make pictures have in common with every other face: their tasks, and the usual strengths."""

from collections.abc import Mapping

from sd.pipeline.settings import IMAGE_GUIDANCE

USUAL: Mapping[str, Mapping[str, float]] = {  # of each command, settings that its users need not give
    "txt2img": {},
    "img2img": {"strength": 0.75},  # the original's
    "inpaint": {"strength": 1.0},
    "depth2img": {"strength": 0.8},
    "edit": {"image_guidance": IMAGE_GUIDANCE},
}
