"""Odd but genuine files: however the weights were wrapped, renamed or stored, each must arrive exactly."""

import make_checkpoint
import pytest
import torch
from conftest import TINY
from hostile import as_big_endian, look, refused_model
from safetensors import safe_open
from safetensors.torch import save_file
from weights_of import equal, expected, parameters

import sd
from convert.actions.convert import convert
from convert.actions.original_writer import schedule_buffers
from convert.checkpoint import POSITION_IDS, read_checkpoint
from convert.errors import UnsupportedFileError, WeightMismatchError
from convert.files.reader import open_checkpoint
from convert.layouts.names import PREFIXES, original_names
from convert.layouts.noise_schedule import alphas_cumprod
from convert.single_part import read_part
from sd.app.cli import main
from sd.config import SD_V1

UNET, VAE = PREFIXES["unet"], PREFIXES["vae"]


@pytest.fixture(scope="module")
def tiny_state(tiny_state):
    """All tensors of a narrow file; each weight is one number of its own, so that files are small."""
    numbers = (torch.tensor(index / len(tiny_state)) for index in range(len(tiny_state)))
    return {
        name: number.expand(value.shape) if value.dim() and value.shape != (1000,) else value
        for (name, value), number in zip(tiny_state.items(), numbers, strict=True)
    }


@pytest.fixture
def save(tmp_path):
    def save(value, name="x.ckpt", metadata=None):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file({key: tensor.contiguous() for key, tensor in value.items()}, path, metadata)
        else:
            torch.save(value, path)
        return path

    return save


def loads(path, state, **options):
    """Loading gives exactly the weights of the state."""
    equal(parameters(sd.load(path, precision="fp32", **options)), expected(state, ema=options.get("weights") == "ema"))


def plain(state):
    return {name: value for name, value in state.items() if not name.startswith("model_ema.")}


# Wrappers


@pytest.mark.parametrize("wrapper", ["model", "ema", "module", "params", "weights"])
def test_weights_under_another_wrapper_are_found(save, tiny_state, wrapper):
    path = save({wrapper: tiny_state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3})
    with open_checkpoint(path) as file:
        checkpoint = read_checkpoint(file)
        assert all(checkpoint.tensors[n] is file.root[wrapper][o.name] for n, o in original_names(TINY).items())
    assert (checkpoint.config, checkpoint.unknown) == (TINY, ())


def test_wrappers_inside_wrappers_are_taken_off(save, tiny_state):
    path = save({"model": {"state_dict": tiny_state}, "global_step": 5})
    loads(path, tiny_state)
    assert look(path).global_step == 5


def test_two_sets_of_weights_are_not_guessed_between(save, tiny_state):
    path = save({"model": tiny_state, "ema": tiny_state})
    refused_model(path, UnsupportedFileError, "holds 2 sets of weights: model, ema", "save one of them alone")


def test_optimiser_states_callbacks_and_settings_beside_the_weights_do_not_matter(save, tiny_state):
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    training = {"optimizer_states": [adam.state_dict()], "lr_schedulers": [{"last_epoch": 2}], "epoch": 1}
    path = save({"state_dict": tiny_state, **training, "hyper_parameters": {"lr": 1e-4}})
    loads(path, tiny_state)
    assert look(path).unknown == ()


# Names


def renamed(state, rename):
    return {rename(name): value for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.diffusion_model.", "model.module.diffusion_model."),
        lambda name: name.replace("diffusion_model.", "diffusion_model._orig_mod."),
        lambda name: name.replace("first_stage_model.", "first_stage_model._orig_mod.module."),
        lambda name: name.replace(".transformer_blocks.0.", ".transformer_blocks.0._orig_mod."),
        lambda name: name.removeprefix("model.") if name.startswith("model.") else name,
        lambda name: name.removeprefix(UNET),
        lambda name: name.removeprefix(VAE),
        lambda name: name.replace("text_model.", ""),  # NovelAI's way
    ],
    ids=range(11),
)
def test_every_way_to_spell_the_names_gives_the_same_weights(save, tiny_state, rename):
    state = plain(tiny_state)
    path = save(renamed(state, rename))
    with open_checkpoint(path) as file:
        checkpoint = read_checkpoint(file)
        for ours, (name, _) in original_names(TINY).items():
            assert checkpoint.tensors[ours] is file.root[rename(name)]
            assert checkpoint.stored_names[ours] == rename(name)
    assert (checkpoint.config, checkpoint.unknown) == (TINY, ())


def test_names_in_safetensors_are_spelt_in_as_many_ways(save, tiny_state):
    state = plain(tiny_state)
    path = save(renamed(state, lambda name: f"module.{name.replace('text_model.', '')}"), "x.safetensors")
    loads(path, state)


def test_averaged_weights_of_a_compiled_network_are_found(save, tiny_state):
    path = save(
        renamed(tiny_state, lambda n: n.replace("diffusion_model", "diffusion_model_orig_mod") if "_ema." in n else n)
    )
    loads(path, tiny_state, weights="ema")


def test_a_weight_under_two_spellings_is_refused(save, tiny_state):
    name = "model.diffusion_model.out.2.bias"
    path = save(plain(tiny_state) | {f"module.{name}": torch.ones(4)})
    refused_model(
        path, WeightMismatchError, f"holds {name} twice, as {name} and as module.{name}", "unclear which of the two"
    )


def test_errors_use_the_names_of_the_file(save, tiny_state):
    state = renamed(plain(tiny_state), lambda name: f"module.{name}")
    state["module.model.diffusion_model.out.2.bias"] = torch.full((4,), torch.nan)
    with pytest.raises(WeightMismatchError, match=r"NaN.*: module\.model\.diffusion_model\.out\.2\.bias"):
        sd.load(save(state))
    state["module.model.diffusion_model.out.2.bias"] = torch.ones(5)
    with pytest.raises(WeightMismatchError, match=r"module\.model\.diffusion_model\.out\.2\.bias has the shape \[5\]"):
        sd.load(save(state))


def test_additions_left_in_a_checkpoint_are_set_aside_and_named(save, tiny_state):
    extras = {
        "control_model.input_blocks.0.0.weight": torch.ones(2),
        "lora_unet_mid_block.lora_up.weight": torch.ones(2),
        "embedding_manager.embedder": torch.ones(2),
        "unet.down_blocks.0.resnets.0.conv1.weight": torch.ones(2),
        "encoder.mid.attn_1.q.weight": torch.ones(2),
        "cond_stage_model.transformer.text_projection.weight": torch.ones(2),
    }
    path = save(plain(tiny_state) | extras)
    loads(path, tiny_state)
    assert set(look(path).unknown) == set(extras)


# Content


@pytest.mark.slow
def test_damaged_or_missing_position_ids_do_not_matter(save, tiny_state):
    ids = torch.arange(77)[None]
    for damaged in (
        ids.half() * 0.9999,
        ids.float() - 0.0025,
        ids.to(torch.float8_e4m3fn),
        ids[:, :5],
        torch.tensor(0),
    ):
        path = save(plain(tiny_state) | {POSITION_IDS: damaged})
        assert look(path).unknown == ()
        assert POSITION_IDS not in look(path).stored_names.values()
    loads(path, tiny_state)
    bare = {name: value for name, value in plain(tiny_state).items() if name != POSITION_IDS}
    loads(save(bare), tiny_state)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_attention_of_the_vae_and_projections_may_be_linear_or_convolutions(save, tiny_state, axes):
    pointwise = [name for name, unit in original_names(TINY).values() if unit]
    state = plain(tiny_state)
    state |= {name: state[name].reshape(state[name].shape[:2] + (1,) * axes) for name in pointwise}
    assert len(pointwise) == 40
    loads(save(state), tiny_state)


def test_one_file_may_hold_every_precision(save, tiny_state):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    state = {
        name: value.to(kinds[index % len(kinds)]) if value.is_floating_point() else value
        for index, (name, value) in enumerate(plain(tiny_state).items())
    }
    model = sd.load(save(state), precision="fp32")
    equal(parameters(model), {name: value.float() for name, value in expected(state).items()})


def test_float8_weights_with_scales_are_refused_as_what_they_are(save, tiny_state):
    scale = f"{UNET}out.2.scale_weight"
    path = save(plain(tiny_state) | {scale: torch.ones(())})
    refused_model(path, WeightMismatchError, "float8 weights with scales", scale, "float16 copy")


# What the file says of its training


@pytest.mark.parametrize(
    ("extra", "metadata", "prediction"),
    [
        ({}, {}, "eps"),
        ({"v_pred": torch.empty(0)}, {}, "v"),
        ({}, {"modelspec.prediction_type": "v"}, "v"),
        ({}, {"modelspec.prediction_type": "v_prediction"}, "v"),
        ({}, {"modelspec.predict_key": "V"}, "v"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "eps"),
        ({}, {"modelspec.prediction_type": "of doom"}, "eps"),
    ],
)
def test_the_prediction_is_the_one_that_the_file_states(save, tiny_state, extra, metadata, prediction):
    checkpoint = look(save(plain(tiny_state) | extra, "x.safetensors", metadata))
    assert checkpoint.config.prediction == prediction
    assert checkpoint.unknown == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_usual_schedule_in_any_precision_is_not_worth_a_word(save, tiny_state, dtype):
    tables = {name: table.to(dtype) for name, table in schedule_buffers(TINY.schedule).items()}
    assert look(save(plain(tiny_state) | tables)).notes == ()


def test_our_table_of_the_schedule_is_torch_s():
    table = schedule_buffers(SD_V1.schedule)["alphas_cumprod"]
    assert torch.allclose(torch.tensor(alphas_cumprod(SD_V1.schedule)), table, rtol=1e-6, atol=0)
    assert f"{alphas_cumprod(SD_V1.schedule)[-1]:.7f}" == "0.0046601"  # of the released files


def test_another_schedule_is_told(save, tiny_state, capsys):
    table = schedule_buffers(TINY.schedule)["alphas_cumprod"]
    roots = table.double().sqrt()
    ending_in_noise = (((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2).float()
    path = save(plain(tiny_state) | {"alphas_cumprod": ending_in_noise})
    assert look(path).said.ends_in_noise
    path = save(plain(tiny_state) | {"alphas_cumprod": table**2})
    (note,) = look(path).notes
    assert "alphas_cumprod is not that of its family" in note
    assert look(save(plain(tiny_state) | {"alphas_cumprod": table * torch.nan})).notes
    assert main(["convert", str(path), str(path.with_suffix(".safetensors"))]) == 0
    assert "The usual schedule is used." in capsys.readouterr().err
    (note,) = look(save(plain(tiny_state) | {"ztsnr": torch.empty(0)})).notes
    assert "ztsnr" in note


def test_what_the_publisher_says_of_the_model_is_kept(save, tiny_state, tmp_path):
    said = {"modelspec.title": "Horses", "modelspec.hash_sha256": "0xold", "format": "pt", "config": "theirs"}
    path = save(plain(tiny_state), "x.safetensors", said)
    for target, layout in (("a.safetensors", "sd-zoo"), ("b.safetensors", "original")):
        convert(path, tmp_path / target, layout=layout)
        with safe_open(tmp_path / target, "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.title"] == "Horses"
        assert "modelspec.hash_sha256" not in metadata
        assert metadata.get("config", "") != "theirs"
    assert look(tmp_path / "a.safetensors").config == TINY


# Parts

LOSSES = {  # what the training of a VAE leaves in its file
    "loss.logvar": torch.zeros(()),
    "loss.perceptual_loss.net.slice1.0.weight": torch.ones(3),
    "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    "model_ema.encoderconv_inweight": torch.ones(3),
    "model_ema.decay": torch.tensor(0.9),
}


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_vae_alone_is_read_where_a_vae_is_asked_for(save, tiny_state, prefix, wrapped):
    state = {prefix + n.removeprefix(VAE): v for n, v in tiny_state.items() if n.startswith(VAE)} | LOSSES
    path = save({"state_dict": state, "global_step": 3} if wrapped else state, "x.vae.pt")
    with open_checkpoint(path) as file:
        vae = read_part(file, "vae")
        stored = file.root["state_dict"] if wrapped else file.root
        assert all(vae.tensors[n] is stored[prefix + o.name.removeprefix(VAE)] for n, o in vae.names.items())
    assert (vae.config.vae, len(vae.tensors)) == (TINY.vae, 248)
    refused_model(path, WeightMismatchError, "has no UNet and no text encoder", "only those of a VAE")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "_orig_mod."])
def test_a_unet_alone_is_named(save, tiny_state, prefix):
    state = {prefix + n.removeprefix(UNET): v for n, v in tiny_state.items() if n.startswith(UNET)}
    refused_model(
        save(state), WeightMismatchError, "has no VAE and no text encoder", "only those of a UNet", "complete"
    )


# What is no checkpoint


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x"},
            "textual inversion",
        ),
        ({"<horse>": torch.ones(768)}, "textual inversion"),
        ({"<horse>": torch.ones(3, 768)}, "textual inversion"),
        (torch.ones(768), "single tensor of the shape [768]"),
        ({"state": {}, "param_groups": []}, "state of an optimiser"),
        ({"optimizer": {"state": {}}}, "state of an optimiser"),
        ({768: [{"linear": torch.ones(2)}, {"linear": torch.ones(2)}], "step": 3}, "is a hypernetwork"),
        (
            {"fc.weight": torch.zeros(2)},
            "holds 1 tensor, none with the name of a weight of Stable Diffusion 1, 2 or XL",
        ),
        ({"a": 1}, "holds no tensors"),
        ([], "no dictionary of tensors"),
    ],
)
def test_what_people_take_for_a_checkpoint_is_named(save, value, words):
    refused_model(save(value), UnsupportedFileError, words)


@pytest.mark.slow
def test_a_stream_of_before_torch_1_6_loads_as_a_model(tmp_path, tiny_state):
    path = tmp_path / "old.ckpt"
    with make_checkpoint.pretended_lightning() as callback:
        whole = {"state_dict": tiny_state, "callbacks": {callback: {"best": torch.tensor(1.0)}}, "global_step": 9}
        torch.save(whole, path, _use_new_zipfile_serialization=False)
    loads(path, tiny_state)
    loads(path, tiny_state, weights="ema")
    convert(path, tmp_path / "x.safetensors")
    assert look(tmp_path / "x.safetensors").config == TINY


@pytest.mark.slow
def test_a_checkpoint_from_a_big_endian_machine_arrives_exactly(save, tiny_state, tmp_path):
    state = {name: value.float() for name, value in plain(tiny_state).items() if name != POSITION_IDS}
    path = save({"state_dict": state, "global_step": 5})
    path.write_bytes(as_big_endian(path.read_bytes(), lambda key: 4))
    loads(path, tiny_state)
    convert(path, tmp_path / "x.safetensors")
    loads(tmp_path / "x.safetensors", tiny_state)


def test_tensors_that_share_one_storage_or_lie_askew_arrive_exactly(tmp_path, tiny_state):
    names = [name for name in plain(tiny_state) if name.startswith(UNET) and tiny_state[name].dim() > 1][:9]
    askew = names.pop()
    values = {name: torch.randn(tiny_state[name].shape) for name in (*names, askew)}
    pool = torch.cat([values[name].flatten() for name in names])
    windows = pool.split([values[name].numel() for name in names])
    state = plain(tiny_state) | {n: w.reshape(values[n].shape) for n, w in zip(names, windows, strict=True)}
    state[askew] = torch.nn.Parameter(values[askew].transpose(0, 1).contiguous().transpose(0, 1))
    path = tmp_path / "x.ckpt"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(state, path, **options)
        loads(path, plain(tiny_state) | values)
