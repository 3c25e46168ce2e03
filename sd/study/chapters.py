"""The chapters of the course, for pages that name them or link to them."""

from html import escape

CHAPTERS = {  # the file and the title
    1: ("1-why-latents.md", "Why latents?"),
    2: ("2-the-vae.md", "The VAE"),
    3: ("3-from-words-to-vectors.md", "From words to tokens to vectors"),
    4: ("4-the-unet.md", "The UNet, block by block"),
    5: ("5-noise-and-samplers.md", "Noise schedules and samplers"),
    6: ("6-guidance.md", "Classifier-free guidance"),
    7: ("7-training.md", "Training"),
    8: ("8-variations.md", "Image to image and inpainting"),
    9: ("9-checkpoints.md", "What is in a checkpoint"),
    10: ("10-adapters.md", "Adapters"),
    11: ("11-version-2-and-xl.md", "Stable Diffusion 2 and XL"),
    12: ("12-depth-and-editing.md", "Depth to image and editing"),
}


def chapters(numbers: tuple[int, ...], course: str | None) -> str:
    """Where the course says more, as HTML: links, or titles where it is not known where the course is.

    course  the address of its folder, for links: `course`/6-guidance.md
    """
    return "<br>".join(chapter(number, course) for number in numbers)


def chapter(number: int, course: str | None) -> str:
    file, title = CHAPTERS[number]
    name = f"Chapter {number} of the course: {escape(title)}"
    return name if course is None else f'<a href="{escape(course.rstrip("/"))}/{file}">{name}</a>'


def where(course: str | None) -> str:
    """For a page that can't link to the course: where it is."""
    return "" if course else "The course is in the folder docs/course of sd-zoo’s source code."
