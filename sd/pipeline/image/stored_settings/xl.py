"""What other programs store for Stable Diffusion XL: a second prompt, the sizes that it is told, and a refiner."""

from sd.pipeline.image.stored_settings.comfy_graph import Graph
from sd.pipeline.image.stored_settings.web_ui import Found

OF_THE_REFINER = ("switch_at", "aesthetic_score", "negative_aesthetic_score")
SIZES = (("width", "height"), ("crop_w", "crop_h"), ("target_width", "target_height"))


def add_refiner(found: Found, name: object) -> None:
    """Note the refiner; without one, what is stored for it means nothing, and some programs always store it."""
    if isinstance(name, str) and name not in ("", "None") and "switch_at" in found.settings:
        found.made_with["refiner"] = {"name": name}
        if found.program == "Fooocus":
            found.settings["switch_by"] = "steps"
        return
    for setting in OF_THE_REFINER:
        found.settings.pop(setting, None)
    if name not in ("", "None", None):
        found.unused.append(f"refiner {str(name)[:60]}, of which nothing says when it takes over")


def leave_out_same(found: Found) -> None:
    """A second prompt that repeats the first one says nothing."""
    for name in ("prompt", "negative_prompt"):
        second = found.settings.get(f"{name}_2")
        if second is not None and str(second).strip() in ("", found.settings.get(name)):
            del found.settings[f"{name}_2"]


def add_both_texts(graph: Graph, found: Found, node: str, ours: str) -> None:
    """The texts of a node that has one for each text encoder: CLIP's in `text_l`, OpenCLIP's in `text_g`."""
    first, second = (graph.value(node, key) for key in ("text_l", "text_g"))
    if not (isinstance(first, str) and isinstance(second, str)):
        return
    found.settings |= {ours: first.strip(), f"{ours}_2": second.strip()}
    if first.strip() and not second.strip():
        found.unused.append(f"that the second text encoder reads no {ours.replace('_', ' ')} (node {node[:20]})")
    leave_out_same(found)


def add_sizes(graph: Graph, found: Found, positive: str, negative: str | None = None) -> None:
    """The sizes that such a node tells the model, where they are not those of the picture."""

    def pairs(node: str) -> list[tuple[object, object]]:
        return [tuple(graph.value(node, key) for key in keys) for keys in SIZES]

    if "text_g" not in graph.nodes[positive][1]:
        return
    original, crop, target = pairs(positive)
    picture = found.settings.get("width"), found.settings.get("height")
    if None not in original and original != picture:
        found.settings["original_size"] = "x".join(map(str, original))
    if None not in crop and crop != (0, 0):
        found.settings["crop"] = ",".join(map(str, crop))
    if None not in (*target, *picture) and target != picture:
        found.unused.append(f"target size {'x'.join(map(str, target))[:40]}")
    if negative and "text_g" in graph.nodes[negative][1] and pairs(negative) != [original, crop, target]:
        found.unused.append("other sizes for the negative prompt")
