"""The VAE in less memory gives the same, to the bit, and leaves what it was given alone."""

import subprocess
import sys

import pytest
import torch
from conftest import TINY, fill

from sd.networks.vae import ResidualBlock
from sd.runtime.cpu.precise_norms import make_precise
from sd.runtime.execution import Execution
from sd.runtime.low_memory.lean_vae import LARGE, lean
from sd.study.benchmark.process import memory_is_known


@pytest.fixture(scope="module")
def vae():
    vae = fill(TINY)["vae"]
    make_precise(vae)  # as loading does
    return vae


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_and_pictures_are_the_same_to_the_bit(vae, dtype):
    vae.to(dtype)
    latents, image = torch.randn(1, 4, 8, 9).to(dtype), torch.rand(1, 3, 64, 72).to(dtype)
    given = latents.clone(), image.clone()
    plain = vae.decode(latents), *vae.encode(image)
    with lean(vae):
        found = vae.decode(latents), *vae.encode(image)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert torch.equal(latents, given[0])
    assert torch.equal(image, given[1])
    assert not any("forward" in vars(module) for module in vae.modules())


@torch.no_grad()
def test_pictures_are_made_so(vae, monkeypatch):
    seen = []

    def silu(x, inplace=False, own=torch.nn.functional.silu):
        seen.append(inplace)
        return own(x, inplace=inplace)

    monkeypatch.setattr(torch.nn.functional, "silu", silu)
    Execution().decode(vae, torch.randn(1, 4, 8, 8).to(vae.quant_conv.weight.dtype), "")
    blocks = [module for module in vae.decoder.modules() if isinstance(module, ResidualBlock)]
    assert seen == [True] * (2 * len(blocks) + 1)  # the last one is the decoder's own


def test_with_gradients_the_blocks_are_as_they_are_written(vae):
    vae.float().requires_grad_(True)
    try:
        with torch.enable_grad(), lean(vae):
            assert not any("forward" in vars(module) for module in vae.modules())
            vae.decode(torch.randn(1, 4, 8, 8)).sum().backward()
        assert all(weight.grad is not None for weight in vae.decoder.parameters())
    finally:
        vae.requires_grad_(False)


@torch.no_grad()
def test_holes_are_given_back_before_each_large_level(vae, monkeypatch):
    given_back = []
    monkeypatch.setattr("sd.runtime.low_memory.lean_vae.give_back_freed_memory", lambda: given_back.append(1))
    vae.float()
    starts = []
    hooks = [
        level.register_forward_pre_hook(lambda _, given: starts.append(given[0].numel())) for level in vae.decoder.up
    ]
    with lean(vae):
        for side in (8, 64):
            vae.decode(torch.randn(1, 4, side, side))
    for hook in hooks:
        hook.remove()
    assert len(given_back) == sum(numbers >= LARGE for numbers in starts) > 0
    assert min(starts) < LARGE


@pytest.mark.skipif(not memory_is_known(), reason="memory is counted by Linux")
def test_freed_memory_goes_back_to_the_system():
    """In a process of its own, which keeps what it frees: 64 MB below something small that is still used."""
    code = """if True:
        import gc, os, torch
        from sd.study.benchmark.process import own_memory
        from sd.runtime.cpu.process_memory import give_back_freed_memory, keep_freed_memory
        assert keep_freed_memory()
        before = own_memory(os.getpid())
        large, small = torch.ones(1 << 24), torch.ones(1 << 10)
        del large
        kept = own_memory(os.getpid()) - before
        give_back_freed_memory()
        print(kept >> 20, (own_memory(os.getpid()) - before) >> 20)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept >= 60
    assert left < 10
