"""Adapters in prompts, with the meaning that the web UI gives them, and in flags."""

import pytest

from sd.pipeline.settings import SettingError, Settings
from sd.text.prompt_adapters import from_flag


def settings(prompt, **options):
    return Settings(**{"prompt": prompt, "width": 64, "height": 64, "seed": 1, "steps": 4, **options})


@pytest.mark.parametrize(
    ("prompt", "uses"),
    [  # name, UNet, text encoder
        ("a <lora:x>", [("x", 1, 1)]),
        ("a <lora:x:0.8>", [("x", 0.8, 0.8)]),
        ("a <lora:x:0.5:0.8>", [("x", 0.8, 0.5)]),
        ("<lora:x:te=0.5>", [("x", 0.5, 0.5)]),
        ("<lora:x:unet=0.5>", [("x", 0.5, 1)]),
        ("<lora:x:0.3:unet=.5>", [("x", 0.5, 0.3)]),
        ("<lora:x:0.3:0.4:te=-1>", [("x", 0.4, -1)]),
        ("<lora:x:te=0.1:unet=0.2>", [("x", 0.2, 0.1)]),
        ("<lyco:x:2> <LoRA:y:1e-1>", [("x", 2, 2), ("y", 0.1, 0.1)]),
        ("<lora: a name (v1.2) : 0.8 >", [("a name (v1.2)", 0.8, 0.8)]),
        ("<lora:a=b:0.8>", [("a=b", 0.8, 0.8)]),
        ("<lora:sub/x.v2:0.5>", [("sub/x.v2", 0.5, 0.5)]),
        ("<lora:x:0.5><lora:y:1> <lora:x:0.25:1>", [("x", 1.5, 0.75), ("y", 1, 1)]),
        ("[a <lora:x:1>:b <lora:y:1>:0.5]", [("x", 1, 1), ("y", 1, 1)]),  # wherever they stand, for every step
        ("3<lora <lora:x <lora> <hypernet:x:1> <loras:x:1>", []),
    ],
)
def test_brackets_mean_what_they_mean_in_the_web_ui(prompt, uses):
    assert list(settings(prompt).adapters) == uses


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a<lora:x:1> cat", ["a cat"] * 4),
        ("(a <lora:x:1>:1.2)", ["(a :1.2)"] * 4),
        ("[a <lora:x:1>:b<lora:y:1>:0.5]", ["a ", "a ", "b", "b"]),
        ("[a|b<lora:x:1>]", ["a", "b", "a", "b"]),
    ],
)
def test_they_are_taken_out_before_anything_else_is_read(prompt, texts):
    first, second = settings(prompt, hires=2, hires_steps=2).passes()
    assert list(first.texts_by_step()[0]) == texts
    assert not any("<" in text for text in second.texts_by_step()[0])


def test_in_negative_and_in_plain_prompts_they_are_text():
    assert settings("a", negative_prompt="<lora:x:1>").texts_by_step()[1][0] == "<lora:x:1>"
    plain = settings("a <lora:x:1>", plain_prompts=True, lora="y:0.5")
    assert plain.texts_by_step()[0][0] == "a <lora:x:1>"
    assert plain.adapters == (("y", 0.5, 0.5),)


@pytest.mark.parametrize(
    ("bracket", "problem"),
    [
        ("<lora:x:o.8>", "has <lora:x:o.8>, whose strength 'o.8' is not a number from -100 to 100."),
        ("<lora:x:>", "whose strength '' is not a number"),
        ("<lora:x:nan>", "whose strength 'nan' is not a number"),
        ("<lora:x:1e999>", "whose strength '1e999' is not a number"),
        ("<lora:x:unet=a>", "whose strength 'a' is not a number"),
        ("<lora::1>", "names no adapter. Write <lora:NAME:STRENGTH>."),
        ("<lora:te=1>", "names no adapter"),
        ("<lora:x:1:1:4>", "ranks cannot be cut here"),
        ("<lora:x:1:dyn=4>", "ranks cannot be cut here"),
        ("<lora:x:in=0.5:out=1>", "in=, out= is not supported: the UNet has one strength, unet=."),
        ("<lora:x:mid=0.5>", "mid= is not supported"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(bracket, problem):
    with pytest.raises(SettingError) as error:
        settings(f"a {bracket}")
    assert error.value.name == "prompt"
    assert problem in error.value.problem


@pytest.mark.parametrize(
    ("text", "use", "as_flag"),
    [
        ("x", ("x", 1, 1), "x:1"),
        ("x:0.8", ("x", 0.8, 0.8), "x:0.8"),
        ("x:0.8:0.5", ("x", 0.8, 0.5), "x:0.8:0.5"),
        (" x : .8 ", ("x", 0.8, 0.8), "x:0.8"),
        (r"C:\loras\x.safetensors", (r"C:\loras\x.safetensors", 1, 1), r"C:\loras\x.safetensors:1"),
        (r"C:\loras\x.safetensors:-1", (r"C:\loras\x.safetensors", -1, -1), r"C:\loras\x.safetensors:-1"),
        ("a: b:0.5", ("a: b", 0.5, 0.5), "a: b:0.5"),
        ("a:2:0.5:0.5", ("a:2", 0.5, 0.5), "a:2:0.5:0.5"),  # a name that ends like a strength
        ("7:0.5", ("7", 0.5, 0.5), "7:0.5:0.5"),
        ("x:0.123456789", ("x", 0.123456789, 0.123456789), "x:0.123456789"),
    ],
)
def test_a_flag_has_the_unet_first_and_survives_being_stored(text, use, as_flag):
    assert from_flag(text) == use
    assert from_flag(text).as_flag == as_flag
    assert from_flag(as_flag) == use
    stored = settings("a", lora=[text])
    assert (stored.lora, settings(**stored.to_dict())) == ((as_flag,), stored)


@pytest.mark.parametrize("text", ["", ":0.5", "x:", "x:101", "x:0:-1e9", "x\0", "\ud800"])
def test_a_flag_without_a_name_or_with_a_huge_strength_is_refused(text):
    with pytest.raises(SettingError) as error:
        settings("a", lora=["y", text])
    assert error.value.name == "lora"


@pytest.mark.parametrize("options", [{"prompt": "<lora:x:1>" * 101}, {"prompt": "", "lora": ["x"] * 101}])
def test_a_picture_has_at_most_a_hundred(options):
    with pytest.raises(SettingError, match="names 101 adapters; at most 100 are read"):
        settings(**options)


def test_adapters_of_flags_and_prompts_add_up_and_keep_batches_apart():
    both = settings("a <lora:x:0.5>", lora=["x:0.25:0", "y", "y"])
    assert both.adapters == (("x", 0.75, 0.5), ("y", 2, 2))
    assert both.goes_with(settings("b <lora:y:2> <lora:x:0.5:0.75>"))
    assert not both.goes_with(settings("a <lora:x:0.5>"))
