"""The comparison of a device with the CPU, run on the CPU itself: there, everything is the same."""

import json
import math

import check_device
import numpy as np
import pytest
from PIL import Image


def test_decibels_by_hand():
    black, grey = Image.new("RGB", (2, 2)), Image.fromarray(np.full((2, 2, 3), 51, dtype=np.uint8))
    assert check_device.decibels([black], [grey]) == pytest.approx(20 * math.log10(5))
    assert check_device.decibels([grey, black], [grey, grey]) == pytest.approx(20 * math.log10(5) + 10 * math.log10(2))
    assert check_device.decibels([grey], [grey]) > 1000


@pytest.mark.slow
def test_on_the_cpu_all_pictures_are_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(check_device.COMMON, "steps", 1)
    monkeypatch.setattr(check_device, "SAMPLERS", ("dpmpp_2m", "euler_a"))
    out = tmp_path / "found.json"
    assert check_device.main(["--device", "cpu", "--ways", "fp32", "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    jobs = ["dpmpp_2m", "euler_a", "two at a time", "image to image", "inpainting"]
    assert [row["job"] for row in told["pictures"]] == jobs
    assert all(row["dB"] > 60 for row in told["pictures"])
    assert told["same"]["captured or not, difference"] == 0
    assert told["same"]["in tiles or not, dB"] > 50
    assert capsys.readouterr().out.count("| fp32 |") == len(jobs)


@pytest.mark.slow
def test_pictures_that_rounding_does_not_explain_are_told_by_the_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(check_device.COMMON, "steps", 1)
    monkeypatch.setattr(check_device, "SAMPLERS", ("dpmpp_2m",))
    monkeypatch.setattr(check_device, "same_on", lambda device: {})
    monkeypatch.setattr(check_device, "measured", lambda device, model, job: ([Image.new("RGB", (1, 1))], 0, 0))
    assert check_device.main(["--device", "cpu", "--ways", "fp32"]) == 1
