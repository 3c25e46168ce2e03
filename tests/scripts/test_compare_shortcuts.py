"""The script that compares runs with options that save operations, on a model with made-up weights."""

from dataclasses import replace

import compare_shortcuts
import pytest
import torch
from conftest import TINY, assemble

from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.training.shapes.scoring import one_thing


@pytest.mark.slow
def test_shortcuts_are_compared_with_runs_without_them(tiny_networks):
    model, requests = assemble(replace(TINY, native_size=64), tiny_networks), one_thing(1)[:2]
    shortcuts = [{"reuse_features": 1}, {"reuse_features": 2}, {"merge_tokens": 0.5}]
    shortcuts += [{"reuse_features": 2, "merge_tokens": 0.5}]
    lines = compare_shortcuts.compared(model, requests, [2], [1, 2], shortcuts).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    options = [["", "", ""], *(["1", "1", ""], ["2", "1", ""]), *(["1", "2", ""], ["2", "2", ""])]
    options += [["", "", "0.5"], ["1", "2", "0.5"], ["2", "2", "0.5"]]
    assert [row[:4] for row in rows] == [["2", *each] for each in options]
    assert all(row[4].endswith(" %") and row[7].endswith(" s") for row in rows)
    assert [row[5:7] for row in rows[:3]] == [["", ""], ["inf dB", "inf dB"], ["inf dB", "inf dB"]]
    assert all(10 < float(row[6].removesuffix(" dB")) < 100 for row in rows[3:])


@pytest.mark.slow
def test_operations_of_shortcuts_are_as_documented():
    unet, x_t = build_networks(SD_V1)["unet"], torch.empty(1, 4, 64, 64, device="meta")
    assert round(compare_shortcuts.without_inner_blocks(unet, x_t, 1) / 803_273_441_280, 3) == 0.079
    assert compare_shortcuts.merged(unet, [x_t], [0.5]).splitlines()[-1] == "| 512×512 | 0.5 | 724.4 G | 90.2 % |"
