"""Adapters in commands: named by flags and prompts, found in a folder, noted in pictures and found again."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY, refused, settings_of
from PIL import Image

import sd
from convert.layouts.adapter_names import FAMILIES
from sd.app.cli.flags import adapter
from sd.app.errors import UsageError
from sd.app.jobs.adapter_folder import find_adapter, find_again, use_again
from sd.app.jobs.adapters import (
    are_consistent,
    find_adapters,
    in_turn,
    line_about,
    misread,
    objections,
    with_few_steps,
)
from sd.pipeline.settings import SettingError, Settings

SMALL = ["-W", 64, "-H", 64, "--steps", 1, "-s", 1, "--precision", "fp32", "-g", 1]


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """A folder of adapters beside the models folder: "detail", also called "fine detail", and "sub/style"."""
    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("SD_MODELS", str(tmp_path / "models"))
    lora(folder / "detail.safetensors", lora_shapes(), {"ss_output_name": "fine detail"}, size=0.3)
    lora(folder / "sub" / "style.safetensors", lora_shapes(), seed=1, size=0.3)
    return folder


def settings(prompt, **options):
    return Settings(**{"prompt": prompt, "width": 64, "height": 64, "seed": 1, **options})


def autov3(path):
    """As the web UI computes it."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def rendered(path):
    with Image.open(path) as picture:
        return picture.tobytes()


# Pictures


@pytest.mark.slow
def test_flag_brackets_and_python_make_the_same_picture_and_note_it_alike(run, loras, tiny_ckpt, tmp_path):
    common = [*SMALL, "-m", tiny_ckpt]
    code, (flag,), err = run("txt2img", "a cat", *common, "--lora", "detail:0.8:0.5", "-o", "flag.png")
    assert code == 0
    line = "sd: lora detail: 204 modules (192 UNet, 12 text encoder), rank 4, alpha 2, strength 0.8 (text encoder 0.5)"
    assert err.splitlines().count(line) == 1
    _, (brackets,), _ = run("txt2img", "a cat <lora:detail:0.5:0.8>", *common, "-o", "brackets.png")
    _, (plain,), _ = run("txt2img", "a cat ", *common, "-o", "plain.png")
    model = sd.load(tiny_ckpt, precision="fp32")
    model.apply([(loras / "detail.safetensors", 0.8, 0.5)])
    (python,) = model.txt2img("a cat", width=64, height=64, steps=1, seed=1, guidance_scale=1)
    assert rendered(flag) == rendered(brackets) == python.tobytes() != rendered(plain)
    digest = autov3(loras / "detail.safetensors")
    for texts in (Image.open(flag).text, Image.open(brackets).text, python.info):
        assert texts["parameters"].startswith("a cat <lora:detail:0.5:0.8>\nSteps: 1, ")
        assert f", Lora hashes: detail: {digest[:12]}, Version" in texts["parameters"].replace('"', "")
        noted = [{"name": "detail", "autov3": digest, "strength": 0.8, "text_strength": 0.5}]
        assert json.loads(texts["sd"])["adapters"] == noted
    assert json.loads(python.info["sd"])["lora"] == settings_of(flag)["lora"] == ["detail:0.8:0.5"]
    assert "adapters" not in settings_of(plain)
    code, (again,), _ = run("txt2img", "--like", flag, "-m", tiny_ckpt, "-o", "again.png")
    assert (code, Path(again).read_bytes()) == (0, Path(flag).read_bytes())
    code, out, _ = run("show", flag)
    assert f"adapters:            detail ({digest[:12]})" in out
    assert "lora:                detail:0.8:0.5" in out


@pytest.mark.slow
def test_lines_with_the_same_adapters_run_together_and_a_stopped_run_is_resumed(run, loras, tiny_ckpt, tmp_path):
    lines = [
        "a cat <lora:detail:1>",
        "a dog",
        '{"prompt": "a cow", "lora": ["style:0.5"]}',
        "a bird <lora:detail>",
        '--prompt "a fish" --lora style:0.25 --lora style:0.25',
        '{"prompt": "a bat", "lora": "style:0.5"}',
    ]
    (tmp_path / "jobs.txt").write_text("\n".join(lines))
    command = ["txt2img", "--from-file", "jobs.txt", *SMALL, "-m", tiny_ckpt, "-b", 2, "-o", "out"]
    code, out, err = run(*command)
    assert code == 0
    order = [Path(path).name[:5] for path in out]
    assert order == ["00002", "00001", "00004", "00003", "00005", "00006"]
    assert "sd: 3 sets of adapters, 2 switches\n" in err
    assert err.count("sd: lora style: ") == err.count("sd: lora detail: ") == 1
    _, (alone,), _ = run("txt2img", "a bird", *SMALL, "-s", 4, "-m", tiny_ckpt, "--lora", "detail", "-o", "alone.png")
    difference = (abs(a - b) for a, b in zip(rendered(alone), rendered(tmp_path / "out/00004-4.png"), strict=True))
    assert max(difference) <= 1  # a batch may round otherwise
    (tmp_path / "out" / "00003-3.png").unlink()
    code, (again,), err = run(*command)
    assert (code, Path(again).name) == (0, "00003-3.png")
    assert "5 of 6 pictures exist already" in err
    lora(loras / "sub" / "style.safetensors", lora_shapes(), seed=2)  # another one of that name
    code, out, err = run(*command)
    assert [Path(path).name for path in out] == ["00007-3.png", "00008-5.png", "00009-6.png"]


def test_sets_of_adapters_are_counted_and_those_without_any_come_first():
    jobs = [
        settings(prompt) for prompt in ("a <lora:x:1>", "b", "c <lora:y:1>", "d <lora:x>", "e <lora:y:1><lora:x:1>")
    ]
    assert in_turn([[0], [1], [2], [3], [4]], jobs) == ([[1], [0], [3], [2], [4]], 4, 3)
    assert in_turn([[0, 3], [2]], jobs) == ([[0, 3], [2]], 2, 2)
    assert in_turn([[1]], jobs) == ([[1]], 1, 0)


# Names


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("detail", "detail.safetensors"),
        ("DETAIL", "detail.safetensors"),
        ("detail.safetensors", "detail.safetensors"),
        ("fine detail", "detail.safetensors"),  # what its training called it
        ("style", "sub/style.safetensors"),
        ("sub/style", "sub/style.safetensors"),
        (r"sub\style.safetensors", "sub/style.safetensors"),
        ("v1.5", "v1.5.pt"),
        ("peft", "peft"),
        ("here.safetensors", None),  # a file in the working folder
        ("./here", None),
        ("here", None),
    ],
)
def test_an_adapter_is_found_by_path_name_or_alias(loras, monkeypatch, given, found):
    monkeypatch.chdir(loras.parent)
    (loras / "v1.5.pt").touch()
    (loras / "peft").mkdir()
    (loras / "peft" / "adapter_model.safetensors").touch()
    for name in ("here", "here.safetensors", "detail"):  # the last one is not the adapter
        Path(name).touch()
    assert find_adapter(given) == (loras / found if found else Path(given))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("detial", ["the adapter detial does not exist: there is none of that name in ", "Did you mean detail?"]),
        ("det", ["Did you mean detail?"]),  # no part of a name, which others take
        ("detail:o.8", ["Strengths are numbers: NAME:STRENGTH. Did you mean detail?"]),
        ("zzz", ["Give the path of its file, or put it there."]),
        ("same", ["the adapter same could be a/same.pt or b/same.pt. Give more of the name."]),
        ("folder", ["the adapter folder is a folder without one. Give the file itself."]),
    ],
)
def test_a_name_that_is_none_or_several_gets_a_sentence(loras, monkeypatch, given, parts):
    monkeypatch.chdir(loras.parent)
    Path("folder").mkdir()
    for name in ("a/same.pt", "b/same.pt"):
        (loras / name).parent.mkdir()
        (loras / name).touch()
    with pytest.raises(UsageError) as error:
        find_adapter(given)
    assert all(part in str(error.value) for part in parts)


def test_a_path_becomes_a_name_that_other_programs_can_find(loras, tmp_path):
    lora(tmp_path / "other.safetensors", lora_shapes())
    jobs = [settings("a", lora=[f"{tmp_path / 'other.safetensors'}:0.5", "detail.safetensors", "sub/style:0:1"])]
    (job,), adapters = find_adapters(jobs, TINY)
    assert job.lora == ("other:0.5", "detail:1", "sub/style:0:1")
    assert {name: path.name for name, path in adapters.paths.items()} == {
        "other": "other.safetensors", "detail": "detail.safetensors", "sub/style": "style.safetensors"}  # fmt: skip
    (job,), adapters = find_adapters([settings("a <lora:fine detail:0.5>", lora="detail:0.25:1")], TINY)
    assert list(adapters.uses(job).values()) == [("fine detail", 0.75, 1.5)]


def test_an_existing_file_is_one_as_a_whole_even_if_it_ends_like_a_strength(loras, monkeypatch):
    monkeypatch.chdir(loras)
    shutil.copy("detail.safetensors", "v:2")
    job = settings("a", lora=[adapter("v:2"), adapter("v:2:0.5")])
    assert job.adapters == (("v:2", 1, 1), ("v", 2, 0.5))


# Refused, before any weights are read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["a <lora:detial:1>"], ["the adapter detial does not exist", "Did you mean detail?"]),
        (["a", "--lora", "nothere.safetensors"], ["the adapter nothere.safetensors does not exist"]),
        (["a <lora:v2:1>"], ["v2.safetensors", "Stable Diffusion 2", "Stable Diffusion 1"]),
        (["a <lora:broken:1>"], ["broken.safetensors"]),
        (["a <lora:detail:x>"], ["--prompt has <lora:detail:x>, whose strength 'x' is not a number from -100 to 100."]),
        (["a", "--lora", "detail:1000"], ["--lora 'detail:1000' has a strength out of range: -100 to 100."]),
        (["a", "--lora", ""], ["--lora '' is not NAME, NAME:STRENGTH or NAME:STRENGTH:TEXT_STRENGTH."]),
        (["a", "--lora", "detail", "--lora", "more/detail.safetensors"], ["two adapters are called detail: "]),
        (["--from-file", "jobs.txt"], ["jobs.txt, line 2: the adapter nope does not exist"]),
        (["a", "--lora-model-dir", "x"], ["Give the file, --lora FOLDER/NAME.safetensors"]),
        (["a", "--lora-scale", "1"], ["Put the strength behind the name: --lora NAME:0.8."]),
        (["a", "--loras", "x"], ["Use --lora."]),
    ],
)
def test_what_cannot_be_applied_is_refused_first(run, loras, tiny_ckpt, tmp_path, monkeypatch, words, parts):
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", lambda *_: pytest.fail("weights are read"))
    lora(loras / "v2.safetensors", lora_shapes(FAMILIES[1], rank=1))
    (loras / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "more").mkdir()
    lora(tmp_path / "more" / "detail.safetensors", lora_shapes())
    (tmp_path / "jobs.txt").write_text("a <lora:detail:1>\nb <lora:nope:1>")
    refused(run("txt2img", *words, *SMALL, "-m", tiny_ckpt), *parts)


@pytest.mark.slow
def test_values_that_cannot_be_used_fail_in_a_sentence_and_other_lines_are_made(run, loras, tiny_ckpt, tmp_path):
    name = next(name for name in lora_shapes() if "lora_up" in name)
    lora(loras / "nan.safetensors", lora_shapes(), extra={name: torch.full(lora_shapes()[name], torch.nan)})
    refused(run("txt2img", "a <lora:nan:1>", *SMALL, "-m", tiny_ckpt), "nan.safetensors", "NaN")
    (tmp_path / "jobs.txt").write_text("a\nb <lora:nan:1>\nc <lora:detail:1>")
    code, out, err = run("txt2img", "--from-file", "jobs.txt", *SMALL, "-m", tiny_ckpt, "-o", "out")
    assert (code, len(out)) == (3, 2)
    assert "sd: seed 2: nan.safetensors" in err
    assert "sd: 1 of 3 pictures could not be made." in err


# What is said


@pytest.mark.slow
def test_words_that_an_adapter_brings_along_are_used_and_not_missed(run, loras, tiny_ckpt, tmp_path):
    vectors = {"bundle_emb.glow.emb_params": torch.full((30, TINY.text_encoder.width), 0.1)}
    lora(loras / "lit.safetensors", lora_shapes(), extra=vectors)
    words = " ".join(["cat"] * 60)
    (tmp_path / "jobs.txt").write_text(f"a embedding:glow <lora:lit:1>\n{words} glow<lora:lit:1>\n{words}")
    code, out, err = run("txt2img", "--from-file", "jobs.txt", *SMALL, "-m", tiny_ckpt, "-b", 2, "-o", "out")
    assert (code, len(out), "folders of embeddings" in err) == (0, 3, False)
    assert "rank 4, alpha 2, the words glow, strength 1" in err
    code, out, err = run("txt2img", "--from-file", "jobs.txt", *SMALL, "-m", tiny_ckpt, "-b", 2, "-o", "out")
    assert (out, "3 of 3 pictures exist already" in err) == ([], True)


@pytest.mark.slow
def test_what_is_not_applied_of_a_file_is_said_once(run, loras, tiny_ckpt, tmp_path):
    stray = {"lora_unet_nowhere.lora_up.weight": torch.zeros(4, 4)}
    lora(loras / "odd.safetensors", lora_shapes(), extra=stray)
    code, _, err = run("txt2img", "a <lora:odd:1>", *SMALL, "-m", tiny_ckpt, "--count", 2, "-o", "out")
    assert code == 0
    assert err.count("odd.safetensors holds 1 tensor of 613 that match no module of ") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a <lora:x:1"}, "read as words, for want of a closing >: <lora:x:1"),
        ({"prompt": "<lyco:x", "plain_prompts": True}, None),
        ({"prompt": "a <lora:x:1>"}, None),
        ({"prompt": "<lora:x:1>", "plain_prompts": True},
         "with --plain-prompts, brackets are words: <lora:x:1>. Use --lora for adapters."),
        ({"prompt": "", "negative_prompt": "<lora:x:1> <lora:x:1>"},
         "adapters in a negative or second prompt are read as words: <lora:x:1>. Name them in the prompt."),
        ({"prompt": "", "negative_prompt": "<lora:x:1>", "guidance_scale": 1}, None),
        ({"prompt": "<hypernet:x:1>"}, "hypernetworks are not supported yet, and are read as words: <hypernet:x:1>"),
        ({"prompt": "3<lora"}, None),
    ],
)  # fmt: skip
def test_what_looks_like_an_adapter_and_is_none_is_said(options, said):
    assert list(misread([settings(**options), settings(**options)])) == ([said] if said else [])


def test_an_adapter_for_few_steps_objects_to_usual_settings_only_where_it_is_used(loras):
    lora(loras / "lcm-lora-sdv1-5.safetensors", lora_shapes())
    usual, without, fitting = (
        settings("<lora:lcm-lora-sdv1-5:1>"),
        settings("<lora:lcm-lora-sdv1-5:0:1> <lora:lcm-lora-sdv1-5:0:-1>"),
        settings("<lora:lcm-lora-sdv1-5:1>", steps=4, sampler="lcm", schedule="distilled", guidance_scale=1),
    )
    jobs, adapters = find_adapters([usual, usual, without, fitting], TINY)
    assert [problem[:48] for problem in objections(adapters, jobs)] == [
        "lcm-lora-sdv1-5.safetensors is an LCM-LoRA, and "
    ]
    assert not list(objections(adapters, jobs[2:]))
    assert [are_consistent(adapters, job) for job in jobs] == [True, True, False, True]
    (use,) = adapters.uses(jobs[0]).values()
    assert line_about(use, adapters.read[loras / "lcm-lora-sdv1-5.safetensors"]).endswith("alpha 2, strength 1")


class Notes(list):
    """Keeps what is noted."""

    note = list.append


def test_an_adapter_for_few_steps_gives_its_settings_where_the_user_gave_none(loras):
    for name in ("lcm-lora-sdv1-5", "Hyper-SD15-8steps-lora"):
        lora(loras / f"{name}.safetensors", lora_shapes())
    lcm, hyper = "<lora:lcm-lora-sdv1-5:1>", "<lora:Hyper-SD15-8steps-lora:1>"
    lines = [
        ({}, lcm, ("lcm", "distilled", 4, 1.0)),
        ({"steps": 7}, f"{lcm} <lora:detail:1>", ("lcm", "distilled", 7, 1.0)),
        ({"sampler": "heun", "guidance_scale": 2.0}, lcm, ("heun", "linspace", 4, 2.0)),
        ({}, hyper, ("ddim", "trailing", 8, 1.0)),
        ({}, lcm + hyper, ("dpmpp_2m", "karras", 30, 7.5)),  # neither is right for both
        ({}, "<lora:lcm-lora-sdv1-5:1:0>", ("dpmpp_2m", "karras", 30, 7.5)),  # not in the UNet
        ({}, "<lora:detail:1>", ("dpmpp_2m", "karras", 30, 7.5)),
    ]
    jobs, adapters = find_adapters([settings(prompt, **given) for given, prompt, _ in lines for _ in range(2)], TINY)
    notes = Notes()
    done = with_few_steps(adapters, jobs, [given for given, *_ in lines], notes)
    names = ("sampler", "schedule", "steps", "guidance_scale")
    assert [tuple(getattr(job, name) for name in names) for job in done] == [row for *_, row in lines for _ in range(2)]
    assert notes == [
        "lcm-lora-sdv1-5.safetensors is an LCM-LoRA: using --sampler lcm --schedule distilled --steps 4 "
        "--guidance-scale 1",
        "lcm-lora-sdv1-5.safetensors is an LCM-LoRA: using --sampler lcm --schedule distilled --guidance-scale 1",
        "lcm-lora-sdv1-5.safetensors is an LCM-LoRA: using --steps 4",
        "Hyper-SD15-8steps-lora.safetensors is a Hyper-SD LoRA (8 steps): using --sampler ddim --schedule trailing "
        "--steps 8 --guidance-scale 1",
    ]


@pytest.mark.slow
def test_a_command_with_an_adapter_for_few_steps_makes_its_few_steps(run, loras, tiny_ckpt):
    lora(loras / "lcm.safetensors", lora_shapes())
    common = ["a cat", "-m", tiny_ckpt, "-W", 64, "-H", 64, "-s", 1, "--lora", "lcm", "-o", "cat.png"]
    code, (path,), err = run("txt2img", *common)
    made = settings_of(path)
    assert (code, made["sampler"], made["schedule"], made["steps"], made["guidance_scale"]) == (
        *(0, "lcm", "distilled"),
        *(4, 1.0),
    )
    assert "is an LCM-LoRA: using --sampler lcm" in err
    assert "far from" not in err


# Pictures that were made with them


def test_the_adapter_of_a_picture_is_found_by_name_and_hash(loras):
    detail, style = loras / "detail.safetensors", loras / "sub" / "style.safetensors"
    said = []
    assert find_again("detail", None, said.append) == (detail, False)
    assert find_again("detail", autov3(detail)[:12], said.append) == (detail, False)
    assert said == []
    assert find_again("detail", autov3(style)[:12], said.append) == (style, False)
    assert find_again("old name", autov3(style), said.append) == (style, False)
    assert find_again("old name", hashlib.sha256(style.read_bytes()).hexdigest()[:10], said.append) == (style, False)
    assert find_again("detail", "0" * 12, said.append) == (detail, True)
    assert find_again("old name", "0" * 12, said.append) == (None, False)
    assert said[0] == "looking for the adapter detail by its hash in 1 file"


def test_settings_are_brought_to_what_adapters_are_called_here(loras):
    style = autov3(loras / "sub" / "style.safetensors")
    found = {"prompt": "a <lora:detail:1> <lora:old:0.5:1>, <lora:gone:1>", "lora": ["old:0.5", "lost", "detail"]}
    noted = [{"name": "old", "autov3": style}, {"name": "detail", "autov3": "0" * 12}, {"name": 1}, "x", {"autov3": []}]
    missing, notes = use_again(found, {"adapters": noted}, lambda text: None)
    assert found == {"prompt": "a <lora:detail:1> <lora:sub/style:0.5:1>, ", "lora": ["sub/style:0.5", "detail:1"]}
    assert [text.partition(",")[0] for text in missing] == ["the adapter gone", "the adapter lost"]
    assert notes == [
        "made with another detail (000000000000) than detail.safetensors here: expect another picture",
        f"the adapter old is called sub/style here, by its hash ({style[:12]})",
    ]
    plain = {"prompt": "a <lora:gone:1>", "plain_prompts": True}
    assert (use_again(plain, {}, print), plain["prompt"]) == (([], []), "a <lora:gone:1>")


@pytest.mark.slow
def test_like_goes_on_without_what_is_gone_and_says_so(run, loras, tiny_ckpt, tmp_path):
    _, (made,), _ = run("txt2img", "a <lora:detail:1>", *SMALL, "-m", tiny_ckpt, "--lora", "style", "-o", "made.png")
    shutil.move(loras / "detail.safetensors", tmp_path / "elsewhere.safetensors")
    command = ["txt2img", "--like", made, "-m", tiny_ckpt]
    code, (other,), err = run(*command, "-o", "other.png")
    assert code == 0
    assert f"sd: made.png: could not use the adapter detail ({autov3(tmp_path / 'elsewhere.safetensors')[:12]})" in err
    assert (settings_of(other)["prompt"], settings_of(other)["lora"]) == ("a ", ["style:1"])
    _, (given,), err = run(*command, "-o", "given.png", "--lora", "elsewhere.safetensors", "-p", "b")
    assert (settings_of(given)["lora"], "could not use" in err) == (["elsewhere:1"], False)


# Elsewhere


def test_the_library_says_where_a_prompt_names_what_is_not_applied(model):
    for options in ({"prompt": "a <lora:x:1>"}, {"prompt": "a", "lora": "x"}):
        with pytest.raises(SettingError, match=r"names the adapter x:1, which is not applied\."):
            model.txt2img(**options, width=64, height=64, steps=1)


@pytest.mark.slow
def test_explain_applies_to_each_run_what_its_prompt_names(run, loras, tiny_ckpt):
    command = ["explain", "a cat", *SMALL, "-m", tiny_ckpt, "--lora", "detail"]
    code, out, err = run(*command, "--compare", "prompt=a <lora:style:1>|b", "-o", "page.html")
    assert (code, out) == (0, ["page.html"])
    assert [line.split(":")[1] for line in err.splitlines() if "sd: lora" in line] == [" lora detail", " lora style"]


@pytest.mark.slow
def test_bench_measures_with_adapters(run, loras, tiny_ckpt):
    code, out, _ = run(
        "bench", "-m", tiny_ckpt, "--sizes", 64, "--steps", 2, "--repeat", 1, "--lora", "detail", "--json"
    )
    assert (code, json.loads(out[0])["model"]["lora"]) == (0, ["detail:1"])


def test_tokens_are_those_of_words_only(run):
    code, out, _ = run("tokens", "a cat<lora:x:0.5>", "--json")
    data = json.loads(out[0])
    assert (code, data["lora"], data["texts"][0]["text"]) == (0, ["x:0.5"], "a cat")


def test_a_plain_picture_imports_nothing_of_adapters(run, tiny_ckpt, monkeypatch):
    for name in ("runtime.adapters", "runtime.learned_words", "networks.adapters.weight_change", "pipeline.learning"):
        monkeypatch.setitem(sys.modules, f"sd.{name}", None)  # an import of it fails
    assert run("txt2img", "a cat", "-m", tiny_ckpt, "-W", 64, "-H", 64, "--steps", 1)[0] == 0
