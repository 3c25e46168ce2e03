"""What a picture says of how it was made, whoever made it: read from the file, and as data for programs."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from sd.pipeline.errors import shortened
from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.settings import FIELDS, OF_THE_RUN, SettingError

if TYPE_CHECKING:
    from sd.pipeline.image.stored_settings.web_ui import Found

MASK_FIELDS = [field.name for field in fields(InputSettings)]
VAES = {"vae": "VAE", "tiny_vae": "tiny VAE"}


def read(path: Path) -> "tuple[Found, dict[str, str]]":
    """The settings of a picture, whoever made it, and all texts in it.

    Of a picture of ours, these include the settings of its mask; its init image must be given again. Raises
    NoSettings, or PictureError if it is not a picture.
    """
    from sd.pipeline.image.metadata import exact_in, settings_from
    from sd.pipeline.image.stored_settings.other_programs import settings_of_texts
    from sd.pipeline.image.stored_settings.texts import read_foreign_texts
    from sd.pipeline.image.stored_settings.web_ui import OURS, Found

    texts = read_foreign_texts(path)
    exact = exact_in(texts)
    settings = settings_from(exact)
    if settings is None:
        return settings_of_texts(texts), texts
    if "init" in exact and "Resize mode: " not in texts.get("parameters", ""):
        # no size was asked for: it followed from the input picture, and does so again
        exact = {name: value for name, value in exact.items() if name not in ("width", "height")}
    found = {name: value for name, value in settings.to_dict().items() if name in exact}
    unused = [name for name in exact if name not in {*FIELDS, *OF_THE_RUN, *MASK_FIELDS, "init", "mask", "depth"}]
    for name in MASK_FIELDS:
        if name in exact and is_input_setting(name, exact[name]):
            found[name] = exact[name]
        elif name in exact:
            unused.append(f"{name.replace('_', ' ')} {shortened(exact[name])}")
    made_with = {name: exact[name] for name in (*OF_THE_RUN, "init", "depth") if name in exact}
    return Found(found, unused, program=OURS, made_with=made_with), texts


def is_input_setting(name: str, value: object) -> bool:
    """Whether a picture's own text gives a valid value to this setting of an input picture or a mask."""
    try:
        InputSettings(**{name: Expansion.parse(value) if name == "expand" else value})
    except SettingError:
        return False
    return True


def as_data(found: "Found | None") -> dict[str, object]:
    """What is said of a picture; null for a program or settings that nothing says."""
    if found is None:
        return {"program": None, "settings": None}
    prompts = {name: found.settings.get(name) for name in ("prompt", "negative_prompt")}
    facts = {"program": found.program or None, **prompts, "settings": found.settings, "model": {}, **models_of(found)}
    hashes = {"embeddings": "sha256", "adapters": "autov3"}
    used = {
        kind: [{"name": name, hashes[kind]: digest} for name, digest in noted]
        for kind, noted in files_of(found).items()
    }
    return {**facts, **used, "unused": found.unused, "notes": found.notes}


def files_of(found: "Found") -> dict[str, list[tuple[str, str | None]]]:
    """Name and hash of each embedding and adapter that the picture notes."""
    from sd.app.jobs.adapter_folder import noted_adapters
    from sd.app.jobs.embeddings import noted_words

    noted = {"embeddings": [*noted_words(found.made_with)], "adapters": [*noted_adapters(found.made_with)]}
    return {kind: files for kind, files in noted.items() if files}


def models_of(found: "Found") -> dict[str, dict[str, str]]:
    """Name and hash of the model, of its refiner and of a VAE in place of its own, as far as the picture says them."""
    noted = {name: found.made_with.get(name) for name in ("model", "refiner")}
    noted |= {part: noted["model"].get(part) for part in VAES if isinstance(noted["model"], dict)}
    return {
        name: {fact: file[fact] for fact in ("name", "sha256", "hash") if isinstance(file.get(fact), str)}
        for name, file in noted.items()
        if isinstance(file, dict)
    }
