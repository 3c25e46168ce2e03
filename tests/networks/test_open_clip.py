"""The text encoder of Stable Diffusion 2 against OpenCLIP's own code, with the weights under their original names.

Runs where open_clip is installed; the project does not need it: pip install --no-deps open_clip_torch timm torchvision
"""

from dataclasses import replace
from importlib.util import find_spec

import make_checkpoint
import pytest
import torch

from convert.actions.original_writer import original_state_dict
from convert.layouts.names import OPEN_CLIP
from sd.config import SD_V2
from sd.networks.text_encoder import TextEncoder
from sd.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip is not installed")
MOST = {"narrow": 1e-5, "full size": 1e-4}
KEPT = []


def operators_of_torchvision():
    """Declare those that its Python part expects, and that wheels for CUDA lack beside torch for CPUs."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)  # they go with it


def open_clip_tower(config, state):
    """OpenCLIP's model without its picture half; every tensor of its text half is in the file."""
    operators_of_torchvision()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = config.text_encoder
    tower = CLIP(
        embed_dim=text.width,
        vision_cfg=CLIPVisionCfg(layers=1, width=64, head_width=64),
        text_cfg=CLIPTextCfg(
            width=text.width, heads=text.heads, layers=text.layers + 1, vocab_size=text.vocabulary, context_length=77
        ),
    )
    del tower.visual
    bare = {name.removeprefix(OPEN_CLIP): values for name, values in state.items() if name.startswith(OPEN_CLIP)}
    tower.load_state_dict(bare, assign=True)
    return tower.eval()


def their_context(tower, ids):
    """FrozenOpenCLIPEmbedder of Stability-AI/stablediffusion, layer "penultimate"."""
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks[:-1]:
        x = block(x, attn_mask=tower.attn_mask)
    return tower.ln_final(x)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        pytest.param(make_checkpoint.tiny(SD_V2), MOST["narrow"], id="narrow"),
        pytest.param(SD_V2, MOST["full size"], id="full size", marks=pytest.mark.slow),
    ],
)
def test_context_is_that_of_open_clip(config, most):
    config = replace(config, unet=make_checkpoint.tiny(SD_V2).unet, vae=make_checkpoint.tiny(SD_V2).vae)
    weights = make_checkpoint.made_up_weights(config, seed=0)
    encoder = TextEncoder(config.text_encoder)
    prefix = "text_encoder."
    encoder.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})
    state = original_state_dict(config, weights) | make_checkpoint.unused_of_open_clip(config, torch.float32)
    ids = torch.from_numpy(Tokenizer(pad_token=0)(["a photograph of an astronaut riding a horse", ""]))
    found, expected = encoder(ids), their_context(open_clip_tower(config, state), ids)
    assert (found - expected).norm() / expected.norm() < most
