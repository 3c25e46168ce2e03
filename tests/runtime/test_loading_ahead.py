"""Weights read while PyTorch is imported are those of the file, checked; where that cannot be, all is as ever."""

import ctypes
import math
import os
import subprocess
import sys
import threading
import time
import zlib
from contextlib import ExitStack

import make_checkpoint
import pytest
import torch
from conftest import compiled_into, settings_of
from weights_of import equal, expected, parameters

import sd
from convert.errors import CorruptFileError, WeightMismatchError
from convert.files.reader import open_checkpoint
from sd.app.cli import main
from sd.runtime import loading_ahead
from sd.runtime.cpu.native import compiler, cpu_flags
from sd.runtime.loading_ahead import DONE, KERNEL, NEEDED, Job, ReadAhead, is_suitable, number, read_ahead
from sd.study.benchmark.process import memory_is_known

needs_kernel = pytest.mark.skipif(
    not cpu_flags() >= NEEDED or compiler() is None,
    reason="this processor has no AVX-512 with VPCLMULQDQ, or there is no compiler",
)
LINEAR, WINDOW = "model.diffusion_model.time_embed.0.weight", "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module", autouse=True)
def _own_kernel(tmp_path_factory):
    with compiled_into(KERNEL, tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(autouse=True)
def _every_file_is_large(monkeypatch):
    monkeypatch.setattr(loading_ahead, "LARGE", 0)


def bits(count, dtype, *, finite=True):
    """Numbers of all kinds: any bits at all."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(width)
    values = torch.randint(info.min, info.max + 1, (count,), generator=torch.Generator().manual_seed(count)).to(width)
    values = values.view(dtype)
    return torch.where(values.isfinite(), values, torch.ones((), dtype=dtype)) if finite else values


@pytest.fixture
def job(tmp_path):
    """Makes the job for values that lie in a file, behind something else."""
    with ExitStack() as opened:

        def make(values, target=None):
            file = opened.enter_context(open(tmp_path / "values", "w+b"))
            file.write(b"before")
            file.write(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            file.flush()
            address = None if target is None else target.data_ptr()
            return Job(address, 6, values.nbytes, file.fileno(), values.dtype != torch.float32, 0, 0, 0)

        yield make


def known(values):
    """Checksum, largest number and the values in bf16."""
    return zlib.crc32(bytes(values.flatten().view(torch.uint8).numpy())), values.abs().max().item(), values.bfloat16()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65, 127, 128, 1000, 65536, 65537, 200_003])
def test_checksum_largest_number_and_bf16_are_those_of_zlib_and_pytorch(job, dtype, count):
    values, target = bits(count, dtype), torch.full((count + 1,), 7.0).bfloat16()
    crc, most, rounded = known(values)
    one = job(values, target)
    KERNEL.library().sd_read_one(ctypes.byref(one))
    assert (one.crc, number(one.largest, str(dtype).removeprefix("torch."))) == (crc, most)
    assert torch.equal(target[:count].view(torch.int16), rounded.view(torch.int16))
    assert target[count] == 7


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_only_looked_at_has_a_largest_number_too_also_if_it_is_none(job, dtype):
    for value in (torch.nan, torch.inf, -torch.inf, -3.5):
        values = torch.ones(1000, dtype=dtype)
        values[777] = value
        one, (crc, _, _) = job(values), known(values)
        KERNEL.library().sd_read_one(ctypes.byref(one))
        found = number(one.largest, str(dtype).removeprefix("torch."))
        assert math.isnan(found) if math.isnan(value) else found == abs(value)
        assert one.crc == crc


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (5, 3, 3, 3), (8, 40, 3, 3), (64, 17, 1, 1), (2, 600, 3, 2), (3, 40_000, 3, 1)]
)
def test_weights_of_convolutions_are_turned_checked_and_rounded_in_one_reading(job, dtype, shape):
    values = bits(math.prod(shape), dtype).reshape(shape)
    one, (crc, most, rounded) = job(values), known(values)
    outputs, inputs, *window = shape
    target = torch.empty(outputs, *window, inputs, dtype=torch.bfloat16)
    KERNEL.library().sd_turn(ctypes.byref(one), target.data_ptr(), outputs, inputs, math.prod(window))
    assert torch.equal(target.permute(0, 3, 1, 2), rounded)
    assert (one.crc, number(one.largest, str(dtype).removeprefix("torch."))) == (crc, most)


def test_numbers_from_their_bits():
    assert number(0x3C00, "float16") == 1
    assert number(0x3F80, "bfloat16") == 1
    assert number(0x3DCCCCCD, "float32") == torch.tensor(0.1).item()
    assert number(0x7F800000, "float32") == math.inf
    assert math.isnan(number(0x7F800001, "float32"))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"precision": "fp32"}], ids=str)
def test_a_model_has_the_weights_of_the_file(tmp_path, tiny_state, suffix, stored, options):
    options = {"precision": "bf16", **options}
    state = {name: value.to(stored) if value.is_floating_point() else value for name, value in tiny_state.items()}
    path = tmp_path / f"x{suffix}"
    make_checkpoint.save_original(path, state)
    model = sd.load(path, device="cpu", **options)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options["precision"]]
    equal(parameters(model), {name: value.to(dtype) for name, value in expected(state).items()})
    assert model.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@needs_kernel
def test_the_kernel_is_used_for_linear_layers_and_for_convolutions(tmp_path, tiny_ckpt, monkeypatch):
    taken, turned = [], []
    take, turn = ReadAhead.take, ReadAhead.turn
    monkeypatch.setattr(ReadAhead, "take", lambda self, name: taken.append(name) or take(self, name))
    monkeypatch.setattr(ReadAhead, "turn", lambda self, name, target: turned.append(name) or turn(self, name, target))
    model = sd.load(tiny_ckpt, device="cpu", precision="bf16")
    assert {"unet.time_mlp.0.weight", "text_encoder.token_embedding.weight"} & set(taken)
    assert "vae.decoder.conv_in.weight" in turned
    assert set(taken) | set(turned) == set(parameters(model))
    assert not set(taken) & set(turned)


@pytest.mark.parametrize("name", [LINEAR, WINDOW])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_flipped_bit_is_found(tmp_path, tiny_state, name, precision):
    path = tmp_path / "x.ckpt"
    make_checkpoint.save_original(path, tiny_state)
    data, values = bytearray(path.read_bytes()), bytes(tiny_state[name].numpy())
    data[data.index(values) + len(values) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"x\.ckpt has a wrong checksum in its record"):
        sd.load(path, precision=precision)


@pytest.mark.parametrize("name", [LINEAR, WINDOW])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_numbers_that_are_none_are_found(tmp_path, tiny_state, name, value):
    path = tmp_path / "x.ckpt"
    wrong = tiny_state[name].clone()
    wrong.view(-1)[5] = value
    make_checkpoint.save_original(path, {**tiny_state, name: wrong})
    with pytest.raises(WeightMismatchError, match=rf"x\.ckpt .*NaN, infinite .*1 weight: {name.replace('.', '[.]')}"):
        sd.load(path, precision="bf16")


@needs_kernel
def test_a_thread_reads_while_the_caller_does_other_things(tiny_ckpt):
    with open_checkpoint(tiny_ckpt) as file:
        records = {name: record for name, record in file.root["state_dict"].items() if "model_ema" not in name}
        with read_ahead(file, records, device="cpu", precision="bf16", low_memory=True) as ahead:
            until = time.monotonic() + 60
            jobs = {name: ahead._jobs[index] for name, index in ahead._index.items()}
            others = [jobs[name] for name in jobs.keys() - ahead._waiting]
            while time.monotonic() < until and any(job.state != DONE for job in others):
                time.sleep(0.001)
            assert len(jobs) > 100
            assert ahead.spare == 0
            assert {name for name, job in jobs.items() if job.state != DONE} == ahead._waiting
            assert jobs[LINEAR].crc == records[LINEAR].storage.crc
            ahead.stop()
            assert ahead.take(LINEAR).values is not None
        assert ahead._stopped.value
        assert ahead.take(LINEAR) is None


@needs_kernel
def test_what_was_not_read_when_it_is_stopped_is_read_when_it_is_taken(tiny_ckpt, tiny_state):
    with open_checkpoint(tiny_ckpt) as file:
        ahead = ReadAhead(file, file.root["state_dict"], bf16=True)
        ahead.stop()
        assert not any(job.state for job in ahead._jobs)
        values = torch.frombuffer(ahead.take(LINEAR).values, dtype=torch.bfloat16)
        assert torch.equal(values, tiny_state[LINEAR].flatten().bfloat16())


@needs_kernel
def test_precision_is_guessed_and_a_wrong_guess_does_no_harm(tiny_ckpt, tiny_state, tmp_path, monkeypatch):
    def casts(device, precision):
        with read_ahead(file, records, device=device, precision=precision, low_memory=True) as ahead:
            return ahead.casts(LINEAR)

    with open_checkpoint(tiny_ckpt) as file:
        records = file.root["state_dict"]
        monkeypatch.setattr(loading_ahead, "GPUS", [])
        assert casts("auto", "bf16")
        assert casts("cpu", "bf16")
        assert not casts("cpu", "fp32")
        assert casts("auto", "auto") == ("avx512_bf16" in cpu_flags())
        monkeypatch.setattr(loading_ahead, "GPUS", [tmp_path])
        assert not casts("auto", "bf16")
    monkeypatch.setattr(loading_ahead, "GPUS", [])
    monkeypatch.setattr(
        "sd.app.cli.make_pictures.pick_device_and_precision", lambda *_: (torch.device("cpu"), torch.float32)
    )
    common = ["txt2img", "a horse", "-m", str(tiny_ckpt), "-s", "1", "--steps", "1", "-W", "64", "-H", "64", "-q"]
    assert main([*common, "--precision", "bf16", "-o", str(tmp_path / "a.png")]) == 0
    monkeypatch.setattr(loading_ahead, "LARGE", 2**40)
    assert main([*common, "--precision", "fp32", "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert settings_of(tmp_path / "a.png")["precision"]["unet"] == "fp32"


@needs_kernel
def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path, tiny_ckpt):
    path = tmp_path / "x.ckpt"
    path.write_bytes(tiny_ckpt.read_bytes())
    with open_checkpoint(path) as file:
        ahead = ReadAhead(file, file.root["state_dict"], bf16=True)
        os.truncate(path, 1000)
        with pytest.raises(CorruptFileError, match="cannot be read to the end of its record"):
            ahead.take(LINEAR)
        target = torch.empty(file.root["state_dict"][WINDOW].numel, dtype=torch.bfloat16)
        with pytest.raises(CorruptFileError, match="it has changed"):
            ahead.turn(WINDOW, target.data_ptr())


@needs_kernel
def test_wrong_bytes_are_not_used_also_if_they_are_right_when_they_are_looked_at_again(tmp_path, tiny_state):
    path = tmp_path / "x.ckpt"
    make_checkpoint.save_original(path, tiny_state)
    right = path.read_bytes()
    place = right.index(bytes(tiny_state[LINEAR].numpy()))
    path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
    with open_checkpoint(path) as file:
        ahead = ReadAhead(file, file.root["state_dict"], bf16=True)
        KERNEL.library().sd_read_one(ctypes.byref(ahead._jobs[ahead._index[LINEAR]]))
        with open(path, "r+b") as again:
            again.write(right)
        with pytest.raises(CorruptFileError, match="has changed while its record"):
            ahead.take(LINEAR)


@needs_kernel
def test_the_thread_goes_on_when_the_file_was_closed(tiny_ckpt):
    with open_checkpoint(tiny_ckpt) as file:
        ahead = ReadAhead(file, file.root["state_dict"], bf16=False)
    ahead.start()
    until = time.monotonic() + 60
    while time.monotonic() < until and any(job.state != DONE for job in ahead._jobs):
        time.sleep(0.001)
    assert len(ahead._jobs) > 100
    assert all(job.state == DONE for job in ahead._jobs)
    descriptors = list(ahead._descriptors.values())
    ahead.close()
    del ahead
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("large", [0, 2**40])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_happens_while_a_thread_is_started(tiny_ckpt, monkeypatch, large, error):
    """An interrupt is one; without a thread, all is read when it is taken."""
    monkeypatch.setattr(loading_ahead, "LARGE", large)
    monkeypatch.setattr("threading.Thread.start", lambda self: (_ for _ in ()).throw(error))
    with open_checkpoint(tiny_ckpt) as file, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with read_ahead(file, file.root["state_dict"], device="cpu", precision="fp32", low_memory=True):
            assert error is RuntimeError
        raise KeyboardInterrupt


@pytest.mark.parametrize("missing", ["compiler", "flags", "size"])
def test_where_it_cannot_be_a_thread_checks_checksums(tiny_ckpt, tiny_state, monkeypatch, missing):
    if missing == "compiler":
        monkeypatch.setattr(loading_ahead, "compiler", lambda: None)
    elif missing == "flags":
        monkeypatch.setattr(loading_ahead, "cpu_flags", frozenset)
    else:
        monkeypatch.setattr(loading_ahead, "LARGE", 2**40)
    with open_checkpoint(tiny_ckpt) as file:
        records = file.root["state_dict"]
        with read_ahead(file, records, device="cpu", precision="bf16", low_memory=True) as ahead:
            assert ahead.take(LINEAR) is None
            assert not ahead.casts(LINEAR)
            assert not ahead.turns(WINDOW)
            largest = max(records.values(), key=lambda record: record.nbytes)
            until = time.monotonic() + 60
            while time.monotonic() < until and largest.storage.offset not in file._verified:
                time.sleep(0.001)
            assert largest.storage.offset in file._verified
    model = sd.load(tiny_ckpt, device="cpu", precision="bf16")
    equal(parameters(model), {name: value.bfloat16() for name, value in expected(tiny_state).items()})


def test_only_plain_tensors_with_a_checksum_of_their_own_are_suitable(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"plain": whole.clone(), "part": whole[1:3], "turned": whole.clone().T, "numbers": torch.arange(3)}
    tensors |= {"none": torch.zeros(0), "half": whole.half()}
    torch.save(tensors, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as file:
        assert {name for name, record in file.root.items() if is_suitable(file, record)} == {"plain", "half"}


@pytest.mark.skipif(sys.platform != "linux", reason="it is about the libraries of Linux")
def test_the_largest_library_of_pytorch_is_mapped_before_it_is_imported():
    code = """if True:
        import sys, time
        from sd.runtime.loading_ahead import map_torch
        map_torch()
        until = time.monotonic() + 60
        while "libtorch_cpu" not in open("/proc/self/maps").read() and time.monotonic() < until:
            time.sleep(0.001)
        assert "torch" not in sys.modules
        print("libtorch_cpu" in open("/proc/self/maps").read())
        import torch
        print(torch.ones(2).sum().item())"""
    if os.path.exists(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cuda.so")):
        pytest.skip("with CUDA, it is left alone")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "2.0"]


@pytest.mark.skipif(sys.platform != "linux", reason="it is about the libraries of Linux")
@pytest.mark.parametrize("seconds", [0, 0.03, 0.1])
def test_a_program_may_end_while_the_library_starts_up(seconds):
    code = f"import time; from sd.runtime.loading_ahead import map_torch; map_torch(); time.sleep({seconds})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about the libraries of Linux")
def test_who_is_told_twice_to_end_waits_as_well():
    code = """if True:
        import os, signal, threading
        from sd.runtime.loading_ahead import map_torch
        map_torch()
        for seconds, number in ((0.02, signal.SIGTERM), (0.03, signal.SIGINT), (0.04, signal.SIGHUP)):
            timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_loading_in_several_threads_leaves_them_as_many_as_before(tiny_ckpt):
    before, seen = torch.get_num_threads(), []

    def in_threads(target):
        threads = [threading.Thread(target=target) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for _ in range(3):
        in_threads(lambda: sd.load(tiny_ckpt, device="cpu"))
    in_threads(lambda: seen.append(torch.get_num_threads()))
    assert seen == 3 * [before]


@pytest.mark.skipif(not memory_is_known(), reason="memory is counted by Linux")
def test_what_one_thread_has_freed_is_used_by_the_next_one():
    """Also where the thread that maps the library has taken memory before."""
    code = """if True:
        import ctypes, resource, threading
        from sd.runtime.loading_ahead import map_torch
        from sd.runtime.cpu.process_memory import c_function, keep_freed_memory
        map_torch()
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join()
        assert keep_freed_memory()
        malloc, free = c_function("malloc"), c_function("free")
        malloc.argtypes, malloc.restype, free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
        def work(size, number):
            pieces = [malloc(size) for _ in range(number)]
            for piece in pieces:
                ctypes.memset(piece, 1, size)
            for piece in pieces:
                free(piece)
        def faults(*args):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            thread = threading.Thread(target=work, args=args)
            thread.start()
            thread.join()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults(1 << 28, 1), faults(1 << 24, 15))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, again = map(int, done.stdout.split())
    assert again < new / 10


def test_without_pytorch_nothing_is_mapped(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    loading_ahead.map_torch()
