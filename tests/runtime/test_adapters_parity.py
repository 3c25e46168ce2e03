"""A model with adapters predicts what diffusers' pipeline predicts with the same files, which merges them by PEFT."""

import copy

import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY, fill
from diffusers import DDIMScheduler, StableDiffusionPipeline
from oracles import diffusers_unet, diffusers_vae, relative_error, transformers_text_encoder

from sd.runtime.loading import load

STRENGTHS = {"first": 1.0, "second": 0.5, "third": -1.0}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """In each, one rank and one alpha: with several, diffusers merges wrong numbers."""
    folder = tmp_path_factory.mktemp("adapters")
    options = {"dtype": torch.float32, "size": 0.2}
    shapes = [lora_shapes(rank=3), lora_shapes(rank=2, conv=True), lora_shapes(rank=4)]
    files = zip(STRENGTHS, shapes, strict=True)
    return {name: lora(folder / f"{name}.safetensors", shape, seed=len(name), **options) for name, shape in files}


@pytest.fixture(scope="module")
def pipeline(paths):
    networks = fill(TINY)  # not shared: merging writes into them
    pipeline = StableDiffusionPipeline(
        unet=diffusers_unet(TINY, networks),
        vae=diffusers_vae(TINY, networks),
        text_encoder=transformers_text_encoder(TINY, networks),
        tokenizer=None,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for name, path in paths.items():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return pipeline


ALONE = [pytest.param([name], marks=pytest.mark.slow) for name in STRENGTHS]


@pytest.mark.slow
@pytest.mark.parametrize("names", [[*STRENGTHS], *ALONE], ids=", ".join)
def test_networks_compute_the_same_as_with_merged_weights_of_diffusers(tiny_ckpt, paths, pipeline, names):
    model = load(tiny_ckpt, device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    x_t, timestep = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(321)
    tokens = torch.randint(49406, (2, 77), generator=generator)
    plain = model.text_encoder(tokens)
    model.apply([(paths[name], STRENGTHS[name]) for name in names])
    context = model.text_encoder(tokens)
    assert relative_error(context, plain) > 1e-2
    pipeline.set_adapters(names, [STRENGTHS[name] for name in names])
    pipeline.fuse_lora(adapter_names=names)
    try:
        assert relative_error(context, pipeline.text_encoder(tokens).last_hidden_state) < 1e-6
        inputs = x_t.double(), timestep, context.double()  # both compute in float64: only the weights count
        expected = copy.deepcopy(pipeline.unet).double()(*inputs).sample
        assert relative_error(model.unet.double()(*inputs), expected) < 1e-6
    finally:
        pipeline.unfuse_lora()
