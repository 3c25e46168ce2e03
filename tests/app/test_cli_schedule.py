"""`sd schedule`: noise levels as a table, as JSON and as a plot."""

import json
import sys

import pytest
from conftest import refused
from PIL import Image


@pytest.fixture
def schedule(run):
    return lambda *arguments: run("schedule", *arguments)


def test_a_table_of_the_default_sampler(schedule):
    code, lines, err = schedule("--steps", 3)
    assert (code, err) == (0, "")
    assert lines[0].split() == ["step", "timestep", "sigma", "alpha_bar"]
    assert lines[1].split() == ["1", "999", "14.6146", "0.004660"]  # both ends of the published table
    assert lines[3].split() == ["3", "0", "0.0292", "0.999150"]
    assert lines[4].split() == ["end", "-", "0.0000", "1.000000"]
    assert len(lines) == 5


def test_json_has_the_exact_numbers(schedule):
    _, (line,), _ = schedule("--sampler", "ddim", "--steps", 50, "--json")
    data = json.loads(line)
    assert (data["event"], data["sampler"], data["schedule"], data["steps"]) == ("schedule", "ddim", "leading", 50)
    assert data["timesteps"] == list(range(981, 0, -20))
    assert len(data["sigmas"]) == len(data["alpha_bars"]) == 51
    assert data["sigmas"][-1] == pytest.approx(0.0291672, rel=1e-4)  # the original's end
    assert [1 / (1 + sigma**2) for sigma in data["sigmas"]] == pytest.approx(data["alpha_bars"])


def test_schedules_beside_each_other_by_name_or_by_their_sampler(schedule):
    code, lines, _ = schedule("--steps", 4, "--json", "--compare", "leading,SGM Uniform,Euler a,DPM++ 2M SDE Karras")
    assert code == 0
    pairs = [(data["sampler"], data["schedule"]) for data in map(json.loads, lines)]
    own = [("euler_a", "linspace"), ("dpmpp_2m_sde", "karras")]
    assert pairs == [("dpmpp_2m", "leading"), ("dpmpp_2m", "sgm_uniform"), *own]
    _, lines, _ = schedule("--steps", 4, "--compare", "leading,karras")
    assert lines[0] == "dpmpp_2m, leading"
    assert lines[7] == "" == lines[-1]
    assert lines[8] == "dpmpp_2m, karras"


def test_sigmas_and_pure_noise(schedule):
    _, (line,), _ = schedule("--sigmas", "9,2.5,", "--json")
    assert json.loads(line)["sigmas"] == pytest.approx([9, 2.5, 0])
    _, (line,), _ = schedule("--zero-terminal-snr", "--schedule", "trailing", "--json", "--steps", 4)
    assert json.loads(line)["timesteps"][0] == 999
    assert json.loads(line)["alpha_bars"][0] < 1e-7


def test_a_plot(schedule, tmp_path):
    pytest.importorskip("matplotlib")
    code, lines, _ = schedule("--steps", 5, "--compare", "leading,karras,beta", "-o", "x.png")
    assert (code, lines[-1]) == (0, "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
        colours = {colour for count, colour in picture.convert("RGB").getcolors(100_000) if count > 50}
    # matplotlib's first three colours: a line for each
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours
    assert schedule("--steps", 5, "-o", "x.png", "--force")[0] == 0


def test_without_matplotlib_there_is_a_sentence(schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(
        schedule("-o", "x.png"), "--out needs matplotlib to draw. Install it: pip install '.[plots]' in the checkout.\n"
    )
