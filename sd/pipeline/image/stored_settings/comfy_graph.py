"""A graph of ComfyUI, as it is stored in pictures: nodes with values, and links between them."""

from collections.abc import Iterator

Link = list  # [id of a node, number of its output]
NOT_TEXT = {"clip", "model", "vae", "control_net", "image", "mask", "clip_vision_output", "style_model"}
TEXTS = ("text", "text_g", "prompt", "populated_text", "wildcard_text", "clip_l")
MOST_HOPS = 20  # from an input to the node that holds its value
WIDGETS = {  # what a workflow, which has values without names, means by them; "" is no input
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler", "start_at_step",
                         "end_at_step"),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("ascore", "width", "height", "text"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CheckpointLoader": ("config_name", "ckpt_name"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "VAELoader": ("vae_name",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LatentUpscale": ("upscale_method", "width", "height"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "ImageScale": ("upscale_method", "width", "height"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "LoadImage": ("image",),
}  # fmt: skip


PASSING = ("KSampler", "SamplerCustom", "Conditioning", "VAEEncode", "VAEDecode", "Save", "Preview", "Reroute", "Basic")
ONWARD = ("model", "clip", "vae", "samples", "latent", "latent_image", "guider", "sampler", "sigmas", "noise")
PICTURES = ("images", "image", "pixels")


class Graph:
    """Nodes by their ids: what kind each is, and its inputs, values or links. The graph may hold anything.

    read_from  the nodes that a value was read from
    """

    def __init__(self, nodes: dict[str, tuple[str, dict]]):
        self.nodes = nodes
        self.read_from: set[str] = set()
        self.samplers = {name: None for name, (_, inputs) in nodes.items() if self._is_sampler(inputs)}  # in order

    @classmethod
    def read(cls, prompt: object, workflow: object = None) -> "Graph | None":
        """From the JSON of a "prompt", which has what was run, else of a "workflow". None if it is neither."""
        if isinstance(prompt, dict):
            nodes = {
                name: (node["class_type"], node["inputs"])
                for name, node in prompt.items()
                if isinstance(node, dict) and isinstance(node.get("class_type"), str)
                and isinstance(node.get("inputs"), dict)
            }  # fmt: skip
            if nodes:
                return cls(nodes)
        if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
            return cls(dict(_nodes_of(workflow)))
        return None

    def links(self, name: str) -> dict[str, Link]:
        """The inputs of a node that other nodes give."""
        return {key: value for key, value in self.nodes[name][1].items() if self._is_link(value)}

    def value(self, name: str, *keys: str) -> object:
        """The first of these inputs that a node has: its value, or that of a node that only holds one. None without."""
        passed = []
        for _ in range(MOST_HOPS):
            inputs = self.nodes[name][1]
            passed.append(name)
            given = [key for key in keys if self._is_value(inputs.get(key))]
            if not given:
                return None
            if not self._is_link(inputs[given[0]]):
                self.read_from.update(passed)
                return inputs[given[0]]
            name, keys = str(inputs[given[0]][0]), (given[0], "value", "string", "seed", "int", "float", *TEXTS)
        return None

    def towards(self, starts: list[str]) -> Iterator[str]:
        """Nodes that lead to some nodes, nearest first; samplers are not passed."""
        seen, todo = set(starts), list(starts)
        for name in todo:  # grows
            yield name
            if name in self.samplers:
                continue
            for link in self.links(name).values():
                if str(link[0]) not in seen:
                    seen.add(str(link[0]))
                    todo.append(str(link[0]))

    def not_read(self, end: str) -> Iterator[str]:
        """Nodes that lead to this one and change the picture, but that nothing was read from: FreeU, for example."""
        seen, todo = {end}, [end]
        for name in todo:  # grows
            kind = self.nodes[name][0]
            passes = name == end or name in self.read_from or name in self.samplers or kind.startswith(PASSING)
            if not passes or kind == "VAEEncodeForInpaint":
                yield name
            for key, (source, _) in self.links(name).items() if "ZeroOut" not in kind else ():
                conditions = any(word in key for word in ("positive", "negative", "conditioning"))
                if str(source) not in seen and (conditions or key in ONWARD or (passes and key in PICTURES)):
                    seen.add(str(source))
                    todo.append(str(source))

    def latents_of(self, sampler: str) -> list[str]:
        """The node that gives a sampler what it begins with, in a list; empty without."""
        links = self.links(sampler)
        return [str(links[key][0]) for key in ("latent_image", "latent", "samples") if key in links][:1]

    def passes(self, end: str) -> list[str]:
        """The samplers that run one after the other before this node, the first one first."""
        found: dict[str, None] = {}
        starts = [end]
        while starts:
            sampler = next((name for name in self.towards(starts) if name in self.samplers), None)
            if sampler is None or sampler in found:
                break
            found[sampler] = None
            starts = self.latents_of(sampler)
        return [*found][::-1]

    def texts(self, link: Link, which: str) -> list[tuple[bool, str, str]]:
        """The texts behind a conditioning: whether each is for a part of the picture only, the text, its node."""
        found, seen, todo = [], set(), [(False, link)]
        while todo:
            part, link = todo.pop()
            name = str(link[0])
            kind, inputs = self.nodes[name]
            if name in seen or "ZeroOut" in kind:
                continue
            seen.add(name)
            text = self.value(name, *TEXTS, *([which] if isinstance(inputs.get(which), str) else []))
            if isinstance(text, str):
                found.append((part, text, name))
                continue
            part = part or any(word in kind for word in ("SetArea", "SetMask", "TimestepRange"))
            onward = {key: value for key, value in self.links(name).items() if key not in NOT_TEXT}
            if {"positive", "negative"} <= set(onward):  # a ControlNet: both go through it
                onward = {which: onward["negative" if link[1] == 1 else "positive"]}
            todo += [(part, value) for value in reversed(onward.values())]
        return sorted(found, key=lambda one: one[0])

    def _is_value(self, value: object) -> bool:
        return isinstance(value, int | float | str) or self._is_link(value)

    def _is_link(self, value: object) -> bool:
        return isinstance(value, list) and len(value) == 2 and str(value[0]) in self.nodes

    def _is_sampler(self, inputs: dict) -> bool:
        has_latents = any(self._is_link(inputs.get(key)) for key in ("latent_image", "latent", "samples"))
        return has_latents and any(key in inputs for key in ("sampler_name", "sampler"))


def _nodes_of(workflow: dict) -> Iterator[tuple[str, tuple[str, dict]]]:
    """The nodes of a workflow that are not switched off, in the form of a prompt."""
    sources = {}
    for link in workflow["links"] if isinstance(workflow.get("links"), list) else []:
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int):
            sources[link[0]] = [link[1], link[2]]
    for node in workflow["nodes"]:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str) or node.get("mode") == 2:
            continue
        values = node.get("widgets_values")
        inputs = dict(values) if isinstance(values, dict) else {}
        if isinstance(values, list):
            inputs = dict(zip(WIDGETS.get(node["type"], ()), values, strict=False))
        for one in node["inputs"] if isinstance(node.get("inputs"), list) else []:
            if isinstance(one, dict) and isinstance(one.get("link"), int) and one["link"] in sources:
                inputs[str(one.get("name"))] = sources[one["link"]]
        yield str(node.get("id")), (node["type"], inputs)
