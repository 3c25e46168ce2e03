"""Mistakes in the text encoder that raise no error; test_parity compares its numbers with transformers."""

import pytest
import torch
from conftest import TINY

from sd.networks.text_encoder import quick_gelu
from sd.text.tokenizer import Tokenizer


def encode(network, prompt, **options):
    return network(torch.from_numpy(Tokenizer()([prompt])), **options)


def test_quick_gelu_is_not_gelu():
    # by hand: 1 / (1 + exp(-1.702)); the exact GELU of 1 is 0.84134
    assert quick_gelu(torch.tensor(1.0)).item() == pytest.approx(0.8457958)


def test_a_word_changes_only_the_vectors_from_itself_on(tiny_networks):
    network = tiny_networks["text_encoder"]
    horse, house = encode(network, "a red horse here"), encode(network, "a red house here")
    assert torch.allclose(horse[:, :3], house[:, :3], atol=1e-6)  # start, "a", "red"
    assert (horse[:, 3:] - house[:, 3:]).abs().amax(-1).min() > 1e-4


def test_all_77_positions_come_out(tiny_networks):
    assert encode(tiny_networks["text_encoder"], "").shape == (1, 77, TINY.text_encoder.width)


def test_final_norm_is_applied_even_if_layers_are_skipped(tiny_networks):
    network = tiny_networks["text_encoder"]
    early = encode(network, "a horse", skip_layers=1)
    assert not torch.allclose(early, encode(network, "a horse"), atol=1e-3)
    plain = (early - network.final_norm.bias) / network.final_norm.weight
    assert plain.mean(-1).abs().max() < 1e-5
    assert torch.allclose(plain.std(-1, correction=0), torch.ones(1, 77), atol=1e-3)


def test_too_many_tokens_are_refused(tiny_networks):
    with pytest.raises(ValueError, match="77 positions, got 78"):
        tiny_networks["text_encoder"](torch.zeros(1, 78, dtype=torch.int64))


@pytest.mark.parametrize("skip_layers", [-1, 2])
def test_skipping_all_layers_is_refused(tiny_networks, skip_layers):
    with pytest.raises(ValueError, match="skip_layers must be 0 to 1"):
        encode(tiny_networks["text_encoder"], "", skip_layers=skip_layers)
