"""The settings of the picture that a graph of ComfyUI saves: its sampler's, and those of the nodes that lead to it."""

from collections.abc import Iterator
from itertools import islice

from sd.pipeline.image.stored_settings.adapters import add, use_of
from sd.pipeline.image.stored_settings.comfy_graph import Graph
from sd.pipeline.image.stored_settings.web_ui import Found, read_value, set_model
from sd.pipeline.image.stored_settings.xl import add_both_texts, add_sizes
from sd.pipeline.settings import PROMPTS

SAMPLER_INPUTS = {  # our name in a settings line -> the inputs of a sampler
    "Seed": ("seed", "noise_seed"),
    "Steps": ("steps",),
    "CFG scale": ("cfg",),
    "Sampler": ("sampler_name",),
    "Schedule type": ("scheduler",),
}


def graph_settings(graph: Graph, pixels: str) -> Found | None:
    """The settings of the picture that a graph saves; None if no sampler leads to one.

    pixels  the picture's own size; it says which picture of several this is

    A second sampler that enlarges what a first one made is the second pass, as far as we have one.
    """
    ends = [name for name, (kind, _) in graph.nodes.items() if "Save" in kind or "Preview" in kind]
    ways = [(way, end) for end in ends[:50] if (way := graph.passes(end))]
    ways = (ways or [([name], name) for name in graph.samplers])[:50]
    if not ways:
        return None
    made = [_settings_of(graph, way) for way, _ in ways]
    fitting = [found for found in made if _size_of(found.settings) == pixels]
    found, (way, end) = max(zip(made, ways, strict=True), key=lambda pair: (pair[0] in fitting, len(pair[1][0])))
    found.unused += [_called(graph, name) for name in islice(graph.not_read(end), 20)]
    for name in graph.samplers:
        if name not in way:
            found.unused.append(f"{_called(graph, name)}, from which this picture does not come")
    return found


def _size_of(settings: dict) -> str:
    return str(settings.get("hires") or f"{settings.get('width')}x{settings.get('height')}")


def _called(graph: Graph, name: str) -> str:
    return f"{graph.nodes[name][0][:40]} (node {name[:20]})"


def _settings_of(graph: Graph, way: list[str]) -> Found:
    """Those of the last sampler, or of the one before it, if that is a second pass or goes on with the same noise."""
    found, way = Found(program="ComfyUI"), [*way]
    last = way.pop()
    second = _second_pass(graph, last, way[-1]) if way else {}
    base = way.pop() if second else last
    while way and graph.value(base, "add_noise") == "disable" and graph.latents_of(base) == way[-1:]:
        found.unused.append(f"{_called(graph, base)}, which goes on with the noise of another")
        base = way.pop()
    _add_sampler(graph, found, base)
    _add_prompts(graph, found, base)
    _add_origin(graph, found, [base, *way[::-1]])
    nodes = [texts[0][2] for which in ("positive", "negative") if (texts := _conditioning(graph, base, which))]
    if nodes:
        add_sizes(graph, found, *nodes)
    _add_model(graph, found, base)
    if second and "exact_steps" not in found.settings:
        found.settings |= second
        _add_differences(graph, found, last)
    elif second:
        found.unused.append(_called(graph, last))
    found.unused += [f"{_called(graph, name)}, which comes before" for name in way]
    return found


def _setting(graph: Graph, name: str, *keys: str) -> object:
    """A value of a sampler, or of the nodes that it is put together from."""
    todo = [name]
    for at in todo[:]:
        todo += [
            str(link[0]) for key, link in graph.links(at).items() if key in ("noise", "guider", "sampler", "sigmas")
        ]
    return next((value for at in todo if (value := graph.value(at, *keys)) is not None), None)


def _add_sampler(graph: Graph, found: Found, name: str) -> None:
    for label, keys in SAMPLER_INPUTS.items():
        value = _setting(graph, name, *keys)
        read_value(found, label, value)
        if value is None and (links := [link for key, link in graph.links(name).items() if key in keys]):
            found.unused.append(f"{label}, which comes from {_called(graph, str(links[0][0]))}")
    start, end = graph.value(name, "start_at_step") or 0, graph.value(name, "end_at_step")
    steps = found.settings.get("steps", 0)
    if start or (isinstance(end, int | float) and end < steps):
        found.unused.append(f"that only steps {start} to {end} of {steps} are run by {_called(graph, name)}")


def _conditioning(graph: Graph, name: str, which: str) -> list[tuple[bool, str, str]]:
    links = graph.links(name)
    if "guider" in links and which not in links:
        links = graph.links(str(links["guider"][0]))
    link = links.get(which) or (links.get("conditioning") if which == "positive" else None)
    return graph.texts(link, which) if link else []


def _add_prompts(graph: Graph, found: Found, name: str) -> None:
    """The prompt is the text for all of the picture; texts for parts of it are named."""
    for which, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
        texts = _conditioning(graph, name, which)
        found.settings[ours] = texts[0][1].strip() if texts else ""
        if texts:
            add_both_texts(graph, found, texts[0][2], ours)
        for _, text, node in texts[1:]:
            found.unused.append(f"{text.strip()[:40]!r} (node {node[:20]}), another {which} prompt")
        for _, _, node in texts[:1]:
            clip, depth = graph.links(node).get("clip"), 20
            while clip and depth:
                layer = graph.value(str(clip[0]), "stop_at_clip_layer")
                if isinstance(layer, int) and which == "positive":
                    found.settings["clip_skip"] = -layer
                clip, depth = graph.links(str(clip[0])).get("clip"), depth - 1


def _add_origin(graph: Graph, found: Found, samplers: list[str]) -> None:
    """The size of the empty latents, or the picture, that a sampler begins with; the size may be an earlier one's."""
    strength = _setting(graph, samplers[0], "denoise")
    for sampler in samplers:
        for node in graph.towards(graph.latents_of(sampler)):
            kind, inputs = graph.nodes[node]
            width, height = graph.value(node, "width"), graph.value(node, "height")
            if width is not None and height is not None and "width" not in found.settings:
                found.settings |= {"width": width, "height": height}
                batch = graph.value(node, "batch_size")
                if isinstance(batch, int) and batch > 1:
                    found.notes.append(f"one of {batch} pictures with one seed; only the first can be made again")
            if sampler == samplers[0] and ("LoadImage" in kind or isinstance(inputs.get("image"), str)):
                found.made_with["init"] = {"name": str(graph.value(node, "image"))[:200]}
                found.settings |= {"strength": 1 if strength is None else strength, "exact_steps": True}
                return
    if strength not in (None, 1):
        found.unused.append(f"denoise {strength} of empty latents")


def _add_model(graph: Graph, found: Found, name: str) -> None:
    """The model, and the adapters on its way to the sampler and to the text of the prompt."""
    links = graph.links(name)
    link = links.get("model") or (graph.links(str(links["guider"][0])).get("model") if "guider" in links else None)
    models = [*_chain(graph, link, "model")]
    for node in models:
        set_model(found, graph.value(node, "ckpt_name", "unet_name", "base_ckpt_name", "model_name"), None)
    texts = _conditioning(graph, name, "positive")
    clips = [*_chain(graph, graph.links(texts[0][2]).get("clip"), "clip")] if texts else []
    for node in dict.fromkeys([*models[::-1], *clips[::-1]]):
        for file, unet, text in _adapters(graph, node):
            use = use_of(file, unet if node in models else 0, text if node in clips else 0)
            add(found, use, f"{file} ({_called(graph, node)})")


def _chain(graph: Graph, link: list | None, key: str) -> Iterator[str]:
    """The nodes from which a model or a text encoder comes, the last one first."""
    for _ in range(50):
        if not link:
            return
        yield (node := str(link[0]))
        link = graph.links(node).get(key)


def _adapters(graph: Graph, node: str) -> Iterator[tuple[str, object, object]]:
    """File, strength of the UNet and of the text encoder of each adapter that a node applies."""
    name = graph.value(node, "lora_name")
    strengths = [graph.value(node, key) for key in ("strength_model", "strength_clip")]
    rows = [(name, *(1 if strength is None else strength for strength in strengths))]
    for row in graph.nodes[node][1].values():  # {"on": true, "lora": ..., "strength": ...}, as some nodes have several
        if isinstance(row, dict) and row.get("on", True) and "lora" in row:
            graph.read_from.add(node)
            unet = row.get("strength", 1)
            rows.append((row["lora"], unet, unet if row.get("strengthTwo") is None else row["strengthTwo"]))
    yield from (row for row in rows if isinstance(row[0], str) and row[0] != "None")


def _second_pass(graph: Graph, second: str, first: str) -> dict[str, object]:
    """The settings of a second pass, if the second sampler enlarges what the first one made; empty if not."""
    size, way = None, "latent"
    for node in graph.towards(graph.latents_of(second)):
        if node == first:
            break
        width, height, factor = (graph.value(node, key) for key in ("width", "height", "scale_by"))
        if any(key in graph.nodes[node][1] for key in ("pixels", "image")):
            way = "image"
        if width is not None and height is not None:
            size = size or f"{width}x{height}"
        elif factor is not None:
            size = size or str(factor)
    strength, steps = _setting(graph, second, "denoise"), _setting(graph, second, "steps")
    if size is None or strength is None:
        return {}
    return {"hires": size, "hires_upscale": way, "hires_strength": strength, "hires_steps": steps}


def _add_differences(graph: Graph, found: Found, second: str) -> None:
    """Name what the second pass does otherwise than the first."""
    other = Found()
    _add_sampler(graph, other, second)
    _add_prompts(graph, other, second)
    for name in (*PROMPTS, "sampler", "schedule", "guidance_scale", "seed"):
        if other.settings.get(name) != found.settings.get(name):
            found.unused.append(f"the second pass's {name.replace('_', ' ')} {str(other.settings.get(name))[:40]}")
