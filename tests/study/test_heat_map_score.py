"""The score of heat maps, on pictures and maps made by hand, and from end to end."""

from types import SimpleNamespace

import pytest
import score_heat_maps
import torch
from PIL import Image, ImageDraw
from score_heat_maps import KINDS, judge, mean_inside, requests_for, table, word_heat

from sd.study.explain.attention import Heat
from sd.study.explain.text import token_strip
from sd.text.tokenizer import Tokenizer
from sd.training.shapes.analysis import Thing, Wanted
from sd.training.shapes.scoring import Request

PROMPT = "a red circle to the left of a blue square on a white background"


def drawn():
    picture = Image.new("RGB", (128, 128), (242, 242, 242))
    brush = ImageDraw.Draw(picture)
    brush.ellipse((8, 44, 48, 84), fill=(219, 36, 41))
    brush.rectangle((80, 44, 116, 80), fill=(36, 92, 217))
    return picture


def run_with(heat_of, picture=None):
    """A run of two steps; heat_of gives the (h, w) map of each word."""
    strip = token_strip(PROMPT, Tokenizer(context_length=77, pad_token=49407))
    heats = []
    for side, layers in ((16, 5), (8, 1)):
        maps = torch.stack([heat_of(column.text.strip(), side) for column in strip.columns])
        heats.append(Heat(height=side, width=side, layers=layers, weights=maps.expand(2, -1, -1, -1)))
    step = SimpleNamespace(heats=tuple(heats))
    return SimpleNamespace(strips=(strip,), steps=(step, step), picture=picture or drawn())


REQUEST = Request(
    prompt=PROMPT,
    seed=0,
    wanted=Wanted(background="white", things=(("circle", "red"), ("square", "blue")), relation="left of"),
)


def half(is_left, side):
    """1 in one half of the map, 0 in the other."""
    columns = torch.arange(side) < side / 2
    return (columns if is_left else ~columns).float().expand(side, side)


def test_maps_on_their_own_things_are_right_and_all_others_wrong():
    def right(heat_of):
        return judge(run_with(heat_of), REQUEST).right

    assert right(lambda word, side: half(word in ("red", "circle"), side)) == dict.fromkeys(KINDS, (True, True))
    assert right(lambda word, side: half(word not in ("red", "circle"), side)) == dict.fromkeys(KINDS, (False, False))
    mixed = right(lambda word, side: half(word in ("circle", "blue"), side))
    assert (mixed["shape"], mixed["colour"]) == ((True, True), (False, False))
    assert right(lambda word, side: torch.ones(side, side))["shape"] == (False, False)  # the same everywhere


def test_a_picture_without_both_colours_is_left_out():
    picture = drawn()
    ImageDraw.Draw(picture).rectangle((70, 30, 127, 100), fill=(242, 242, 242))
    assert judge(run_with(lambda word, side: half(True, side), picture), REQUEST) is None


def test_a_words_map_is_the_mean_over_layers_heads_and_steps():
    run = run_with(lambda word, side: torch.full((side, side), 3.0 if side == 16 else 9.0))
    heat = word_heat(run, ["circle"], 32)["circle"]
    assert torch.allclose(heat, torch.full((32, 32), (5 * 3 + 1 * 9) / 6))


def test_the_mean_is_taken_inside_the_box():
    heat = torch.arange(16.0).reshape(4, 4)
    thing = Thing(shape=None, colour="red", centre=(0, 0), box=(0.5, 0, 1, 0.5), area=0.25, scores={})
    assert mean_inside(heat, thing) == pytest.approx((2 + 3 + 6 + 7) / 4)


def test_prompts_have_two_shapes_and_three_colours_side_by_side():
    requests = requests_for(100)
    assert len(requests) == 100
    for each in requests:
        (one, first), (two, second) = each.wanted.things
        assert one != two
        assert len({first, second, each.wanted.background}) == 3
        assert each.wanted.relation != "inside"


def test_the_table_counts_words():
    judged = [judge(run_with(lambda word, side: half(word in ("red", "circle"), side)), REQUEST)]
    assert "| shape | 100.0 % | 2 |" in table(judged, 3)
    assert "1 pictures; 3 more" in table(judged, 3)


def test_the_script_runs_from_end_to_end(tmp_path, capsys):
    score_heat_maps.main([str(tmp_path), "--count", "1", "--steps", "2"])
    assert capsys.readouterr().out == (tmp_path / "heat-maps.md").read_text()
