"""Exported networks: what is in the files, and that they compute what the networks do."""

import json
from dataclasses import replace
from importlib.util import find_spec

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import TINY, fill, rest_slow

from convert.errors import UnsupportedFileError
from convert.files.reader import open_checkpoint
from sd.config import SD_V1, SD_V2, SD_V2_DEPTH, SDXL, SDXL_REFINER
from sd.runtime.onnx.checking import difference, exact_outputs
from sd.runtime.onnx.description import tokenizer
from sd.runtime.onnx.export import check_model
from sd.runtime.onnx.graphs import graphs_of, sizes
from sd.text.tokenizer import Tokenizer

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="sd-zoo[onnx] is not installed"
)
PROMPTS = ["a horse", "", "  Two   CATS, it's 3x4!  ", "<|endoftext|> naïve 🏯 köln", "word " * 100]


@pytest.mark.parametrize("config", rest_slow([SD_V1, SD_V2]), ids=["sd-v1", "sd-v2"])
def test_other_programs_read_our_tokenizer_file(config):
    """The tokenizers library is in Rust, by other people; transformers.js reads the same file."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer(config)))
    ours = Tokenizer(pad_token=config.text_encoder.pad_token)
    assert [each.ids for each in theirs.encode_batch(PROMPTS)] == ours(PROMPTS).tolist()


def test_each_family_exports_the_networks_it_has():
    files = {family.family: [graph.name for graph in graphs_of(family)] for family in (SD_V1, SDXL, SD_V2_DEPTH)}
    last = ["unet", "vae_decoder", "vae_encoder"]
    assert files == {
        "sd-v1": ["text_encoder", *last],
        "sdxl": ["text_encoder", "text_encoder_2", *last],
        "sd-v2-depth": ["text_encoder", "depth", *last],
    }


def test_models_without_timesteps_are_refused(tiny_ckpt):
    schedule = replace(SDXL.schedule, sigma_min=0.002, sigma_max=80.0)
    with open_checkpoint(tiny_ckpt) as file, pytest.raises(UnsupportedFileError, match=r"^tiny.ckpt has noise levels"):
        check_model(file, replace(SDXL, schedule=schedule), 1)


def test_the_yardstick_has_float64s_digits_and_leaves_the_weights_alone():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GroupNorm(2, 8), torch.nn.Linear(8, 3))
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    x = torch.randn(4, 8)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return (self.layers(x),)

    (found,) = exact_outputs(Call(), [x])
    after = layers.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    right = layers.double()(x.double()).numpy()
    assert found.dtype == np.float64
    assert np.abs(found - right).max() < 1e-14


def test_a_difference_is_relative_only_to_values_above_1():
    assert difference([np.array([0.5, 0.2])], [np.array([0.5, 0.3])]) == pytest.approx(0.1)
    assert difference([np.array([50.0, 20.0])], [np.array([50.0, 30.0])]) == pytest.approx(0.2)
    ones = np.ones(3)
    assert np.isnan(difference([ones, np.array([1, np.nan, 1])], [ones, ones]))


def export_and_compare(graph, network, path, *, halved=False):
    """The difference at a size, batch and prompt length that neither the tracing nor the check on export has."""
    from sd.runtime.onnx.graph_files import run_graph, session_of, shapes_of, write_graph

    call = graph.call(network)
    write_graph(path, graph, call, graph.examples(sizes(2, 154, 24, 16, 8), 0), halved=halved)
    session, values = session_of(path), graph.examples(sizes(4, 77, 7, 12, 8), 5)
    taken = {name: given["shape"] for name, given in shapes_of(session)["inputs"].items()}
    assert taken == {name: list(given.shape) for name, given in graph.inputs.items()}
    return difference(run_graph(session, graph, values), exact_outputs(call, values))


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("config", [SD_V1, SD_V2, SDXL], ids=lambda config: config.family)
def test_onnxruntime_computes_what_the_networks_do(config, tmp_path):
    config = make_checkpoint.tiny(config)
    networks = fill(config)
    for graph in graphs_of(config):
        assert export_and_compare(graph, networks[graph.part], tmp_path / "x.onnx") < 1e-4, graph.name


@needs_onnx
@pytest.mark.slow
def test_networks_that_only_some_families_have_are_exported_too(tmp_path):
    depth, refiner = make_checkpoint.tiny(SD_V2_DEPTH), make_checkpoint.tiny(SDXL_REFINER)
    for config, name in ((depth, "depth"), (refiner, "text_encoder")):
        (graph,) = (graph for graph in graphs_of(config) if graph.name == name)
        assert export_and_compare(graph, fill(config)[graph.part], tmp_path / "x.onnx") < 1e-4, name


@needs_onnx
@pytest.mark.slow
def test_weights_in_half_the_space_compute_in_float32(tmp_path):
    (graph,) = (graph for graph in graphs_of(TINY) if graph.name == "vae_encoder")
    network = fill(TINY)["vae"]
    for parameter in network.parameters():
        parameter.data = parameter.half().float()
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    assert export_and_compare(graph, network, whole) < 1e-4
    assert export_and_compare(graph, network, half, halved=True) < 1e-5  # in float16, it would be 1e-3
    assert half.stat().st_size < 0.55 * whole.stat().st_size
