"""How weights change the context, by hand."""

import torch

from sd.text.chunks import chunks_of
from sd.text.conditioning import ContextByStep, encode_chunks, weighted
from sd.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


class Encoder:
    """Two numbers for each token: its position, and its id divided by skip_layers + 1."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, *, skip_layers):
        self.calls.append(len(tokens))
        positions = torch.arange(77.0).expand(len(tokens), 77)
        return torch.stack([positions, tokens.float() / (skip_layers + 1)], dim=-1)


def rows(*prompts):
    return [chunks_of(prompt, TOKENIZER) for prompt in prompts]


def test_vectors_are_multiplied_and_their_mean_is_restored():
    # by hand: doubling the second vector gives 1, 2, 6, 8 with the mean 4.25; it was 2.5
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 2.0], [6.0, 8.0]]) * 2.5 / 4.25
    assert torch.allclose(weighted(vectors, torch.tensor([1.0, 2.0])), expected)


def test_the_mean_is_taken_over_the_whole_chunk_and_no_other():
    (chunk,) = chunks_of("(a:2)", TOKENIZER)
    encoded = encode_chunks(Encoder(), [(chunk, *chunks_of("b", TOKENIZER))])
    plain = encode_chunks(Encoder(), rows("a")) * torch.tensor(chunk.weights)[:, None]
    before = encode_chunks(Encoder(), rows("a")).mean()
    assert torch.allclose(encoded[:, :77], plain * before / plain.mean())
    assert torch.equal(encoded[:, 77:], encode_chunks(Encoder(), rows("b")))


def test_weights_are_applied_in_float32_and_the_result_has_the_networks_precision():
    half = torch.full((77, 768), 0.1, dtype=torch.float16)
    result = weighted(half, torch.tensor([3.0] + [1.0] * 76))
    assert result.dtype == torch.float16
    assert abs(result.float().mean().item() - 0.1) < 1e-4


def test_chunks_follow_one_another_along_the_tokens():
    context = encode_chunks(Encoder(), rows("a " * 76 + "horse", "a BREAK b"))
    assert context.shape == (2, 154, 2)
    assert context[0, 1, 1] == 320
    assert context[0, 77:80, 1].tolist() == [49406, 320, 4558]
    assert context[1, 77:79, 1].tolist() == [49406, 321]


def test_equal_tokens_are_encoded_once_whatever_their_weights():
    encoder = Encoder()
    context = encode_chunks(encoder, rows("a horse", "b", "(a:1.5) horse", "a horse", "[b]"))
    assert encoder.calls == [2]
    assert torch.equal(context[0], context[3])
    assert not torch.equal(context[0], context[2])


def test_layers_are_skipped():
    assert encode_chunks(Encoder(), rows("a"), skip_layers=1)[0, 1, 1] == 160


def test_each_step_has_the_context_of_its_texts():
    by_step = ContextByStep(torch.arange(3.0)[:, None, None], [(0, 2), (0, 2), (1, 2)])
    assert [by_step(step)[0].flatten().tolist() for step in range(3)] == [[0, 2], [0, 2], [1, 2]]
    assert [by_step.changes(step) for step in (1, 2)] == [False, True]
