"""The comparison with other programs: its arithmetic by hand, what it refuses, and a real one with a narrow model."""

import importlib.util
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict

import benchmark
import benchmark_files
import benchmark_parts
import benchmark_workers
import numpy as np
import pytest
import torch
from benchmark_comparing import BOUNDS, Wrong, check_latents
from benchmark_contender import Options
from benchmark_process import ROOT, ContenderFailed, Process, environment
from benchmark_report import COLD, DECODE, LOAD, ONCE, PICTURES, STEP, TEXT, WHOLE, Peak, Report, Row, text

from sd.study.benchmark.memory import memory_is_known

CASE = "512x512, batch 1"
OPTIONS = Options(
    checkpoint="a.ckpt",
    folder="theirs",
    openvino="openvino",
    tiny_vae="taesd.safetensors",
    device="cpu",
    precision="fp32",
    threads=None,
    compile_mode="default",
)
DIFFUSERS = ["diffusers", "diffusers-plain", "diffusers-tuned", "diffusers-compiled"]


@pytest.fixture
def report():
    """Two contenders; the second takes twice the first's median for a step."""
    found = Report(
        machine={"device_name": "Fast 9000", "threads": 2, "system": "Linux", "python": "3.10"},
        settings={},
        versions={"sd-zoo": {"torch": "2", "threads": 2}, "other": {"torch": "3", "threads": 2}},
        precisions={"sd-zoo": "bf16", "other": "fp32"},
        differences={CASE: {"other": 0.0123}},
        references={CASE: "sd-zoo"},
        steps={CASE: 2},
        psnr={CASE: {"sd-zoo": None, "other": 31.25}},
        left_out={"third": "not installed"},
    )
    for contender, once, repeated, own in (
        ("sd-zoo", (10.0,), (4, 1, 3, 2), 1_500_000_000),
        ("other", (5.0,), (5, 9, 4), None),
    ):
        found.rows += [Row(contender=contender, case=ONCE, what=what, seconds=once) for what in (COLD, LOAD)]
        repeats = (TEXT, STEP, DECODE, PICTURES)
        found.rows += [Row(contender=contender, case=CASE, what=what, seconds=repeated) for what in repeats]
        resident = own and 2_000_000_000
        found.peaks += [Peak(contender=contender, case=case, own=own, resident=resident) for case in (ONCE, CASE)]
    return found


def test_medians_and_ratios_by_hand(report):
    rows = {(row["contender"], row["what"]): row for row in report.to_dict()["rows"]}
    first, second = rows["sd-zoo", STEP], rows["other", STEP]
    assert [first[name] for name in ("median", "shortest", "longest", "count", "ratio")] == [2.5, 1, 4, 4, 1]
    assert [second[name] for name in ("median", "shortest", "longest", "count", "ratio")] == [5, 4, 9, 3, 2]
    assert rows["other", COLD]["ratio"] == 0.5
    assert json.loads(json.dumps(report.to_dict()))["differences"] == {CASE: {"other": 0.0123}}


def test_the_table_has_a_line_for_each_contender_and_names_those_left_out(report):
    lines = [" ".join(line.split()) for line in text(report).splitlines()]
    times = "5.000 (4.000-9.000) 2.00 "
    assert lines[:3] == ["Fast 9000, 2 threads; Linux; Python 3.10", "sd-zoo: bf16; torch 2", "other: fp32; torch 3"]
    for line in (
        "sd-zoo 10.000 (10.000-10.000) 1.00 10.000 (10.000-10.000) 1.00 1.50 2.00",
        f"other {4 * times}unknown unknown",
        "difference from the latents of sd-zoo after two steps: other 1.2e-02",
        "PSNR to the picture in fp32 after as many steps, in dB: sd-zoo the same, other 31.2",
        "end to end as a multiple of 2 steps and a decoding, by the shortest times: sd-zoo 0.33, other 0.33",
        "left out: third: not installed",
    ):
        assert line in lines


def test_latents_may_differ_by_as_much_as_the_coarser_precision_explains():
    b = np.full((1, 4, 8, 8), 2.0, dtype=np.float32)
    far, near = b * 1.1, b * 1.00001
    mixed, exact = {"first": "bf16", "exact": "fp32"}, {"first": "fp32", "exact": "fp32"}
    assert check_latents({"first": b, "exact": far}, mixed, CASE)["exact"] == pytest.approx(0.1)
    assert check_latents({"first": b, "exact": near}, exact, CASE)["exact"] == pytest.approx(1e-5, rel=0.05)
    with pytest.raises(Wrong, match=r"so there is no comparison(.|\n)*exact: 1\.0e-01, at most 1e-03"):
        check_latents({"first": b, "exact": far}, exact, CASE)
    assert BOUNDS["fp32"] < BOUNDS["fp16"] < BOUNDS["bf16"] < 1  # unlike latents differ by more than 1
    for bad in (np.nan, np.inf):
        for latents in ({"first": b, "exact": b * bad}, {"first": b * bad, "exact": b}):
            with pytest.raises(Wrong), np.errstate(invalid="ignore"):
                check_latents(latents, mixed, CASE)


def test_a_contender_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(benchmark.NEEDS, "openvino", (("no_such_module", "json"), "pip install it"))
    assert benchmark.missing("openvino") == "no_such_module not installed. pip install it"
    assert benchmark.missing("sd-zoo") == ""
    assert set(benchmark.NEEDS) == set(benchmark_workers.CONTENDERS)
    asked = Options(**{**asdict(OPTIONS), "precision": "bf16"})  # only plain diffusers keeps a precision of its own
    precisions = {name: kind(asked).precision for name, kind in benchmark_workers.CONTENDERS.items()}
    own = {"diffusers": "fp32"} | {name: "int8" for name in precisions if name.endswith("int8")}
    assert precisions == dict.fromkeys(precisions, "bf16") | own


def test_a_contender_that_fails_says_why_and_one_that_ends_its_last_words():
    contender = benchmark_workers.CONTENDERS["sd-zoo"](OPTIONS)
    done = []
    contender.step = lambda: done.append(1)
    assert set(benchmark_workers.answer_to(contender, {"unit": "steps", "count": 3})) == {"seconds"}
    assert len(done) == 3
    process = Process("sd-zoo", OPTIONS)
    for _ in range(2):  # it goes on after a failure
        with pytest.raises(ContenderFailed, match="decode: AttributeError: 'SdZoo' object has no attribute 'model'"):
            process.ask("decode")
    with pytest.raises(ContenderFailed, match="no unit of work is called 'dance'"):
        process.ask("dance")
    if memory_is_known():
        assert 1e6 < process.own_peak < process.resident_peak()
    process.close()
    ended = Process("no-such-contender", OPTIONS)
    with pytest.raises(ContenderFailed, match="ended with exit code 1: KeyError: 'no-such-contender'"):
        ended.ask("imports")
    ended.close()


def test_steps_are_asked_for_together_and_contenders_started_at_once(tmp_path, monkeypatch):
    """A round asks for several steps and takes their mean; intermediate results are written."""
    asked, written = [], []

    class Recorded:
        age, own_peak = 5.0, None

        def __init__(self, name, options):
            self.name = name

        def ask(self, unit, **what):
            asked.append((self.name, unit, what))
            if unit == "latents":
                np.save(what["path"], np.ones((1, 4, 8, 8)))
            return {"seconds": 12.0, "threads": 1, "torch": "2"} if unit == "versions" else {"seconds": 12.0}

        def resident_peak(self):
            return None

        def forget_peak(self):
            pass

        close = forget_peak

    monkeypatch.setattr("benchmark_contest.Process", Recorded)
    monkeypatch.setattr(benchmark, "make_files", lambda *_: None)
    monkeypatch.setattr(benchmark, "space_for", lambda *_: 0)
    monkeypatch.setattr(benchmark, "write_json", lambda report, args: written.append(len(report.rows)))
    flags = "--tiny --contenders sd-zoo,sd-zoo-uncaptured --device cpu --repeat 3 --starts 1 --together 4"
    assert benchmark.main([*flags.split(), "--start-at-once", "--folder", str(tmp_path)]) == 0
    assert written == [4, 4 + 8, 4 + 8]
    steps = [(name, what["count"]) for name, unit, what in asked if unit == "steps"]
    assert sorted(steps[:2]) == [("sd-zoo", 1), ("sd-zoo-uncaptured", 1)]
    assert steps[2:] == 4 * [("sd-zoo", 4), ("sd-zoo-uncaptured", 4)]
    assert sum(unit == "load" for _, unit, _ in asked) == 2


@pytest.mark.slow
def test_on_a_gpu_diffusers_is_tuned_as_its_documentation_advises_and_predicts_the_same(theirs, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "conv_1x1_as_mm", False)
    given = torch.randn(2, 4, 8, 8), torch.tensor(5), torch.randn(2, 77, 64)
    expected = theirs.unet(*given).sample
    assert [name for name in benchmark_workers.CONTENDERS if "diffusers" in name] == DIFFUSERS
    for name in DIFFUSERS:
        contender, pipe = benchmark_workers.CONTENDERS[name](OPTIONS), deepcopy(theirs)
        contender.torch = torch
        contender.tune(pipe, on_gpu=True)
        assert config.conv_1x1_as_mm == (name == "diffusers-compiled")
        assert getattr(pipe, "fusing_unet", False) == (name in ("diffusers-tuned", "diffusers-compiled"))
        compiled, pipe.unet._compiled_call_impl = pipe.unet._compiled_call_impl, None
        assert (compiled is not None) == (name == "diffusers-compiled")
        assert (pipe.unet(*given).sample - expected).abs().max() < 1e-5


def test_the_compiled_contender_is_loaded_compiled_from_the_same_file(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("sd.load", lambda path, **options: asked.append((path, options["compile"])), raising=False)
    options = Options(**{**asdict(OPTIONS), "checkpoint": str(tmp_path / "checkpoint")})
    for name in ("sd-zoo", "sd-zoo-compiled"):
        benchmark_workers.CONTENDERS[name](options).load()
    assert asked == [(options.checkpoint, False), (options.checkpoint, True)]
    assert benchmark_files.missing_files(options, ["sd-zoo", "sd-zoo-compiled"]) == [options.checkpoint]


def compare(tmp_path, *flags):
    """One round on narrow models; what the JSON file says."""
    files = ["--folder", str(tmp_path), "--json", str(tmp_path / "x.json")]
    common = ["--tiny", "--precision", "fp32", "--device", "cpu", "--steps", "2", "--repeat", "1"]
    assert benchmark.main([*common, *files, *flags]) == 0
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["left_out"] == {}
    return told


@pytest.mark.slow
def test_narrow_models_are_compared_from_end_to_end(tmp_path, capsys):
    """sd-zoo and diffusers as processes, with the same weights and noise, a round of each unit."""
    flags = ["--contenders", "sd-zoo,diffusers", "--threads", "1", "--together", "2", "--whole", "3"]
    told = compare(tmp_path, *flags, "--logs", str(tmp_path))
    assert told["machine"]["threads"] == 1
    (difference,) = told["differences"]["64x64, batch 1"].values()
    assert 0 < difference < 1e-4  # two programs, float32
    measured = {(row["contender"], row["case"], row["what"]): row["median"] for row in told["rows"]}
    units = [(ONCE, COLD), (ONCE, LOAD), *(("64x64, batch 1", what) for what in (TEXT, STEP, DECODE, PICTURES))]
    units.append(("a new process, 64x64, 3 steps", WHOLE))
    assert set(measured) == {(name, *unit) for name in ("sd-zoo", "diffusers") for unit in units}
    for name in ("sd-zoo", "diffusers"):
        seconds = {unit: measured[(name, *unit)] for unit in units}
        assert seconds[ONCE, COLD] > seconds[ONCE, LOAD] > 0
        assert seconds[units[-1]] > seconds["64x64, batch 1", DECODE] / 4
        assert seconds["64x64, batch 1", PICTURES] > seconds["64x64, batch 1", DECODE] / 4 > 0
    if memory_is_known():
        assert all(peak["resident"] > 50e6 < peak["own"] for peak in told["peaks"])
    assert set(told["versions"]["diffusers"]) == {"diffusers", "transformers", "accelerate", "torch", "threads"}
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("sd-zoo") for line in lines) == 4  # its versions, and a line in each table
    assert (tmp_path / "sd-zoo.log").exists()


def test_invalid_flags_are_refused_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("kept")
    for flag, value, words in [
        ("--contenders", "sd-zoo,rust", "--contenders 'rust' is not known. There are: sd-zoo, sd-zoo-uncaptured,"),
        ("--contenders", "sd-zoo,sd-zoo", "--contenders names one twice"),
        ("--sizes", "500", "--sizes 500x500: width 500 is not a multiple of 8"),
        ("--batch-sizes", "0", "--batch-sizes '0' is out of range"),
        ("--together", "501", "--together: 501 is out of range: 1 to 500"),
        ("--device", "tpu", "device 'tpu' is not available here"),
        ("--folder", "nowhere", "--folder nowhere is not a folder. Create it first."),
        ("--json", "x.txt", "--json x.txt cannot be written: give a .json file in a folder that exists."),
        ("--json", "there.json", "--json there.json exists already"),
        *(
            (f"--{flag}", "0", f"--{flag}: 0 is out of range")
            for flag in ["repeat", "steps", "threads", "whole", "starts"]
        ),
    ]:
        with pytest.raises(SystemExit) as ended:
            benchmark.main([flag, value])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_contenders_do_not_import_each_others_libraries():
    """Otherwise a cold start would include another contender's imports."""

    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts' / 'benchmarks')!r}); import benchmark_workers\n"
        "assert not {'torch', 'diffusers', 'transformers', 'openvino', 'sd', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_openvinos_networks_answer_as_diffusers_do(tmp_path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed: pip install openvino")
    told = compare(tmp_path, "--contenders", "diffusers,openvino")
    assert told["differences"]["64x64, batch 1"]["openvino"] < BOUNDS["fp32"]


def test_parts_are_measured_beside_the_plain_network_and_agree_with_it(capsys):
    benchmark_parts.main(["--tiny", "--size", "64", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines) if len(cells) > 5}
    names = ["plain", "halves shared", "packed convolutions", "Winograd's algorithm"]
    names += ["attention of ours", "joined gates", "all, as pictures are made"]
    assert list(rows)[-len(names) :] == names
    assert "".join(rows["plain"]).split()[2:] == ["1.00", "0.0e+00"]
    assert all(float(cells[-1]) < 1e-5 for cells in rows.values() if cells[0].strip()[0].isdigit())
