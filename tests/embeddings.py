"""Files of textual inversion as other programs write them. The pictures follow the web UI's image_embedding.py."""

import base64
import json
import zlib

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import nn

RNG = np.random.default_rng(0)


def made_up(count=3, width=64, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def of_web_ui(vectors, name="inside", parameters=dict):
    """What the web UI saves, and, with ParameterDict, what the original script saved."""
    tokens = {"string_to_token": {"*": 265}, "step": 500, "sd_checkpoint": "81761151", "sd_checkpoint_name": "base"}
    return {**tokens, "string_to_param": parameters({"*": nn.Parameter(vectors)}), "name": name}


def saved(write):
    """A layout: called with a path without suffix and the vectors; returns the file."""

    def save(folder, stem, vectors):
        suffix, content, options = write(vectors)
        path = folder / f"{stem}{suffix}"
        if suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        else:
            torch.save(content, path, **options)
        return path

    return save


OLD = {"_use_new_zipfile_serialization": False}
LAYOUTS = {
    "web ui": saved(lambda v: (".pt", of_web_ui(v), {})),
    "web ui, old container": saved(lambda v: (".pt", of_web_ui(v), OLD)),
    "plain tensors": saved(lambda v: (".pt", {"string_to_param": {"*": v.half().float()}}, {})),
    "original": saved(lambda v: (".pt", of_web_ui(v, None, nn.ParameterDict), {})),
    "original, old container": saved(lambda v: (".pt", of_web_ui(v, None, nn.ParameterDict), OLD)),
    "diffusers": saved(lambda v: (".bin", {"<cat-toy>": v}, {})),
    "diffusers, safetensors": saved(lambda v: (".safetensors", {"<cat-toy>": v}, {})),
    "kohya": saved(lambda v: (".safetensors", {"emb_params": v}, {})),
    "list": saved(lambda v: (".pt", [{"a": v[:1]}, {"b": v[1:]}], {})),
    "bare tensor": saved(lambda v: (".pt", v, {})),
    "strided": saved(lambda v: (".pt", {"x": v.t().contiguous().t()}, {})),
}


# Pictures


def as_json(vectors, name="card"):
    entries = {**of_web_ui(vectors, name), "string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}}
    return json.dumps(entries).encode()


def picture(width=96, height=64):
    return Image.fromarray(RNG.integers(1, 256, (height, width, 3), dtype=np.uint8))


def text_card(path, data, key="sd-ti-embedding"):
    info = PngInfo()
    info.add_text(key, base64.b64encode(data).decode())
    picture().save(path, pnginfo=info)
    return path


def random_numbers(count):
    state = 0
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        yield state % 255


def hidden_card(path, packed, border=4, **options):
    """A picture with bytes in the low bits beside it."""
    height = 64
    data = np.frombuffer(packed, np.uint8)
    data = np.resize(data, -(-len(data) // (3 * height)) * 3 * height)
    blocks = []
    for half in (data & 0x0F, data >> 4):
        block = half.reshape(height, -1, 3)
        stream = np.array(list(random_numbers(block.size)), dtype=np.uint8).reshape(block.shape) & 0x0F
        blocks.append((block ^ stream) | 0x10 * RNG.integers(1, 16, block.shape, dtype=np.uint8))
    black = np.full((height, 1, 3), 0x20, np.uint8)
    middle = np.asarray(picture(height=height)) | 1  # no column of it looks black
    whole = np.hstack([blocks[0], black, middle, black, blocks[1]])
    framed = np.pad(whole, ((border, border), (border, border), (0, 0)))
    Image.fromarray(framed).save(path, **options)
    return path


def hidden(path, vectors, name="card", **options):
    return hidden_card(path, zlib.compress(as_json(vectors, name), 9), **options)
