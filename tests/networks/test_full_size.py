"""The main job on real input: a full-size checkpoint in the exact original layout goes in, a picture comes out."""

import os
import subprocess
import sys

import benchmark_loading
import make_checkpoint
import pytest
from conftest import settings_of
from PIL import Image

from convert.actions.convert import convert
from sd.config import SD_V1

pytestmark = pytest.mark.slow

PARAMETERS = 859_520_964 + 83_653_863 + 123_060_480
PACKED = 564_247_040  # of them, weights of the UNet's convolutions


@pytest.fixture(scope="module")
def full_ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "full.ckpt"
    make_checkpoint.save_original(path, make_checkpoint.made_up_state_dict(SD_V1))
    yield path
    path.unlink()  # 4.27 GB


def test_checkpoint_has_the_size_of_the_published_ones(full_ckpt):
    # sd-v1-4.ckpt and v1-5-pruned-emaonly.ckpt: 4,265,380,512 bytes; padding in the zip differs between torch versions
    assert abs(full_ckpt.stat().st_size - 4_265_380_512) < 20_000


@pytest.mark.parametrize(("precision", "width", "packed"), [("fp32", 4, 0), ("bf16", 2, PACKED)])
def test_loading_needs_little_more_memory_than_the_parameters(full_ckpt, precision, width, packed):
    """In the file's own precision, packed weights take the place of those in the file; in others, both are there."""
    _, peak, used = benchmark_loading.first_step(full_ckpt, precision)
    assert used == width
    assert peak <= 1.2 * width * (PARAMETERS + packed)


def test_prompt_to_picture_from_the_command_line(full_ckpt, tmp_path):
    command = [sys.executable, "-m", "sd", "txt2img", "a photograph of an astronaut riding a horse"]
    options = ["-m", str(full_ckpt), "--steps", "2", "--seed", "1", "--out", "x.png"]
    offline = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, cwd=tmp_path, env=offline, check=False
    )
    assert (result.returncode, result.stdout) == (0, "x.png\n"), result.stderr
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (512, 512)
        assert len(picture.getcolors(512 * 512)) > 1000  # noise, not one colour
    settings = settings_of(tmp_path / "x.png")
    assert settings["steps"] == 2
    assert settings["family"] == "sd-v1"


def test_conversion_writes_every_byte_of_the_weights(full_ckpt, tmp_path):
    done = convert(full_ckpt, tmp_path / "x.safetensors", precision="fp16")
    assert (done.tensors, done.parameters, done.nbytes) == (1130, PARAMETERS, 2 * PARAMETERS)
    (tmp_path / "x.safetensors").unlink()
