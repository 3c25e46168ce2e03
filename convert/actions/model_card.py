"""The README.md of a diffusers folder, which the Hugging Face Hub shows as its model card.

It says what the model is, where it comes from and how to load it. The same source gives the same bytes. What strangers
wrote stands on one line: in the YAML as JSON, whose strings are YAML's, and below it as code, in which Markdown means
nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from convert.actions.bake import NOTED
from convert.actions.merge import MODELS
from convert.actions.writing import stated_json
from convert.checkpoint import FORMAT, Checkpoint
from convert.errors import joined, shown
from convert.families.family import ALONE
from convert.families.few_step_names import model_advice
from convert.families.table import family_named
from convert.files.folder_kinds import CHECKPOINTS
from convert.published.known import Known, find_by_sha256
from sd.config import SDXL_REFINER

CARD = "README.md"
LICENCES = {"creativeml open rail-m": "creativeml-openrail-m", "creativeml open rail++-m": "openrail++"}
IDENTIFIERS = {*LICENCES.values(), "openrail", "apache-2.0", "mit", "cc0-1.0"}  # of licences, as the Hub knows them
IDENTIFIERS |= {"cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)  # of a model there
BASES = ("base_model", "modelspec.base_model", "ss_sd_model_name")  # metadata that may hold one
STATED = {  # metadata of the publisher -> in words
    "modelspec.title": "Title",
    "modelspec.author": "Author",
    "modelspec.description": "Description",
    "modelspec.merged_from": "Merged from",
}
MOST = 20  # adapters and models that are named
SHARE = "Read it before you share the model."
PREDICTED = {
    "eps": "the noise (`eps`)",
    "v": "the velocity (`v`)",
    "edm": "the velocity with the opposite sign (`edm`)",
    "x0": "the clean latents (`x0`)",
}
USES = {  # task -> a picture that is made so
    "text to picture": 'model.txt2img("a lighthouse at dawn", seed=1)',
    "inpainting": 'model.inpaint("a red door", "picture.png", "mask.png", seed=1)',
    "editing": 'model.edit("make it snow", "picture.png", seed=1)',
    "depth to image": 'model.depth2img("a marble statue", "picture.png", {depth}seed=1)',
}
REFINES = """base = sd.load("sd_xl_base_1.0.safetensors")
base.refiner = sd.load("FOLDER")  # this folder
images = base.txt2img("a lighthouse at dawn", switch_at=0.8, seed=1)"""


def model_card(
    checkpoint: Checkpoint,
    class_name: str,
    own: Mapping[str, str],
    stated: Mapping[str, str],
    before: Mapping[str, str],
) -> str:
    """The text of the card.

    class_name  that diffusers or transformers loads the folder with
    own         what a file of ours would hold in its metadata: `convert.actions.writing.our_metadata`
    stated      the publisher's metadata, and what was changed
    before      the source's own metadata
    """
    made_from = before if before.get("format") == FORMAT else {}
    known = find_by_sha256(own.get("source_sha256")) or find_by_sha256(made_from.get("source_sha256"))
    lines = ["---", *_front_matter(checkpoint, known, stated), "---", "", f"# {_title(checkpoint)}", ""]
    lines += ["In the layout of the diffusers library, written by `sd convert` of sd-zoo.", ""]
    lines += [f"- {line}" for line in (*_facts(checkpoint, own, stated), *_origin(own, made_from, known, stated))]
    return "\n".join([*lines, "", "## Loading it", "", *_loading(checkpoint, class_name)]) + "\n"


def code(text: str) -> str:
    """Text from a file as Markdown's code, on one line, escaped and capped."""
    text = shown(text.strip())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _front_matter(checkpoint: Checkpoint, known: Known | None, stated: Mapping[str, str]) -> Iterator[str]:
    family, config = family_named(checkpoint.config.family), checkpoint.config
    generation = "stable-diffusion-xl" if config.unet.vector_width else "stable-diffusion"
    values: dict[str, object] = {
        "library_name": "diffusers",
        **_licence_values(known.licence if known else _text(stated, "modelspec.license")),
    }
    if base := _base_model(known, stated):
        values["base_model"] = base
    if not checkpoint.part:
        from_text = "text to picture" in family.tasks and not _refines(checkpoint)
        values["pipeline_tag"] = "text-to-image" if from_text else "image-to-image"
    values["tags"] = [
        generation,
        f"{generation}-diffusers",
        *(["inpainting"] if family.tasks == ("inpainting",) else []),
    ]
    return (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def _licence_values(licence: str) -> dict[str, str]:
    """As the Hub wants them: an identifier, or "other" and a name."""
    if not licence:
        return {}
    plain = re.sub(r"\s+licen[cs]e$", "", licence.lower())
    if (identifier := LICENCES.get(plain, plain)) in IDENTIFIERS:
        return {"license": identifier}
    return {"license": "other", "license_name": shown(licence)}


def _base_model(known: Known | None, stated: Mapping[str, str]) -> str | None:
    """The model on the Hub that it was made from or is, if that is known."""
    names = [_text(stated, name) for name in BASES]
    if known:
        names.insert(0, "/".join(urlsplit(known.address).path.split("/")[1:3]))
    fitting = (name for name in names if HUB_NAME.fullmatch(name) and not name.lower().endswith(CHECKPOINTS))
    return next(fitting, None)


def _title(checkpoint: Checkpoint) -> str:
    title = family_named(checkpoint.config.family).title
    if checkpoint.part == "vae":  # those of all families have the same shapes
        return "VAE of Stable Diffusion"
    return f"{ALONE[checkpoint.part]} of {title}" if checkpoint.part else title


def _facts(checkpoint: Checkpoint, own: Mapping[str, str], stated: Mapping[str, str]) -> Iterator[str]:
    config, said = checkpoint.config, checkpoint.said
    if not checkpoint.part:
        yield f"Family: `{config.family}`, for pictures of about {config.native_size}x{config.native_size} pixels"
    if checkpoint.part in (None, "unet"):
        what = PREDICTED[config.prediction]
        guessed = "; this is a guess, since nothing in the source states it" if said.is_guess else ""
        ends = "; its noise schedule ends in pure noise" if said.ends_in_noise else ""
        levels = config.schedule
        if levels.sigma_max:
            ends += f"; at sigmas from {levels.sigma_min:g} to {levels.sigma_max:g}, without timesteps"
        yield f"The UNet predicts {what}{guessed}{ends}"
        if told := model_advice(own["source_file"], stated, config, own.get("source_sha256")):
            yield f"The source {told.note}"
    kind = {"model": "", "ema": ", averaged over the training (EMA)"}[own["weights"]]
    yield f"Weights: {own['precision']}{kind if checkpoint.part in (None, 'unet') else ''}"


def _origin(
    own: Mapping[str, str], made_from: Mapping[str, str], known: Known | None, stated: Mapping[str, str]
) -> Iterator[str]:
    """Where it comes from, and under which licence."""
    yield f"Source: {_file(own, 'source')}"
    yield from _hashes_inside(own, "source_files")
    if made_from.get("source_file"):
        yield f"The source states that it was made from {_file(made_from, 'source')}"
    if known:
        yield f"Published as [{known.file}]({known.address}): {known.about}"
    added = []
    if "vae_file" in own:
        added.append("the VAE")
        yield f"VAE: from {_file(own, 'vae')}"
        yield from _hashes_inside(own, "vae_files")
    adapters, models = stated_json(stated, NOTED), stated_json(stated, MODELS)
    if isinstance(adapters, list) and adapters:
        added.append("the adapters")
        yield f"Adapters in the weights: {joined([_adapter(each) for each in adapters[:MOST]])}"
    if isinstance(models, dict) and models:
        added.append("the other models")
        yield f"Merged from: {joined([code(_named(each)) for each in [*models.values()][:MOST]])}"
    for name, words in STATED.items():
        if text := _text(stated, name):
            yield f"{words}: {code(text)}"
    theirs = f" Those of {joined(added)} apply, too." if added else ""
    if known:
        yield f"Licence: {known.licence}. {SHARE}{theirs}"
    elif licence := _text(stated, "modelspec.license"):
        yield f"Licence, as the source states it: {code(licence)}. {SHARE}{theirs}"
    else:
        yield f"Licence: not stated in the source; its publisher can tell.{theirs}"


def _text(stated: Mapping[str, str], name: str) -> str:
    return stated.get(name, "").strip()


def _file(values: Mapping[str, str], which: str) -> str:
    """A file by its name and hash. AutoV2, the first ten digits, is what Civitai and the web UIs show."""
    digest = values.get(f"{which}_sha256", "")
    hashed = f", sha256 {code(digest)}, AutoV2 {code(digest[:10])}" if digest else ""
    return code(values[f"{which}_file"]) + hashed


def _hashes_inside(own: Mapping[str, str], name: str) -> Iterator[str]:
    """Those of the files in a folder, by their places in it."""
    for place, digest in json.loads(own.get(name, "{}")).items():
        yield f"{code(place)} in it: sha256 {code(digest)}"


def _named(noted: object) -> str:
    name = noted.get("name") if isinstance(noted, dict) else None
    return name if isinstance(name, str) and name.strip() else "unnamed"


def _adapter(noted: object) -> str:
    strength = noted.get("strength") if isinstance(noted, dict) else None
    return f"{code(_named(noted))} at {strength:g}" if isinstance(strength, (int, float)) else code(_named(noted))


def _refines(checkpoint: Checkpoint) -> bool:
    """Whether it is the second model of XL, for the last steps."""
    return checkpoint.config.family == SDXL_REFINER.family


def _loading(checkpoint: Checkpoint, class_name: str) -> Iterator[str]:
    config, part = checkpoint.config, checkpoint.part
    library = "transformers" if part and part.startswith("text_encoder") else "diffusers"
    if not part:
        depth = "" if config.depth else 'depth="depth.png", '
        use = USES[family_named(config.family).tasks[0]].format(depth=depth)
        plain = f'model = sd.load("FOLDER")  # this folder\nimages = {use}'
        made = REFINES if _refines(checkpoint) else plain
        yield from ["With sd-zoo:", "", "```python", "import sd", "", made, "```", ""]
    elif part == "vae":
        yield from ["With sd-zoo: `--vae FOLDER` of the commands that make pictures, and of `sd convert`.", ""]
    yield from [f"With {library}:", "", "```python", f"from {library} import {class_name}", ""]
    yield from [f'{"network" if part else "pipeline"} = {class_name}.from_pretrained("FOLDER")', "```"]
