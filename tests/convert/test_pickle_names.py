"""Names in a pickle: what torch's safe loader reads is read, other objects are kept unread, calls are told."""

import argparse
import array
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import inspect
import io
import ipaddress
import itertools
import math
import pathlib
import random
import re
import time
import types
import typing
import uuid
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import scan_rates
import torch
import torch._weights_only_unpickler
from hostile import HOOKS, call, dict_of, list_of, name, number, pickled, storage, tensor, text, tuple_of
from test_reader import assert_same

from convert.errors import CorruptFileError, UnsafeFileError
from convert.files.pickle_names import is_known, is_let_through
from convert.files.pickle_reader import read_pickle
from convert.files.reader import open_checkpoint
from convert.files.records import GlobalName, Inert, StorageRecord, TensorRecord

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.float16)}


def saved(tmp_path, value, **options):
    path = tmp_path / "model.ckpt"
    torch.save(value, path, **options)
    return path


def read(value: bytes):
    return read_pickle(pickled(value), lambda key, count, width: StorageRecord(key, 64, 16, "little", None))


def intact(path, beside=None):
    """The weights are all there, to the bit. Returns what lies beside them, and the file."""
    with open_checkpoint(path) as file:
        for key, expected in WEIGHTS.items():
            assert_same(file, file.root["state_dict"][key], expected)
        return file.root.get("beside"), file


# What torch's safe loader accepts


def allowed_names() -> list[str]:
    return sorted(torch._weights_only_unpickler._get_allowed_globals())


def test_every_name_that_torch_s_safe_loader_allows_may_be_mentioned():
    assert len(allowed_names()) > 100
    for full in allowed_names():
        module, _, attribute = full.rpartition(".")
        found = GlobalName(module, attribute)
        assert is_known(found) or is_let_through(found), full
        contents = read(dict_of(weight=tensor(), beside=name(module, attribute)))
        assert type(contents.root["weight"]) is TensorRecord
        assert contents.calls == ()


def with_state(value):
    value.note = "x"
    return value


def quantised():
    return torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.quint8)


SAFE_VALUES = {  # beside the weights: what torch's safe loader reads, and what we make of it
    "a parameter with state": (lambda: with_state(torch.nn.Parameter(torch.ones(2))), TensorRecord),
    "a tensor with state": (lambda: with_state(torch.ones(2)), TensorRecord),
    "a buffer": (lambda: torch.nn.Buffer(torch.ones(2)), TensorRecord),
    "a parameter": (lambda: torch.nn.Parameter(torch.ones(2), False), TensorRecord),
    "conjugated": (lambda: torch.ones(2, dtype=torch.complex64).conj(), Inert),
    "negated": (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, Inert),
    "quantised": (quantised, Inert),
    "quantised by channel": (
        lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        Inert,
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), Inert),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), Inert),
    "on no device": (lambda: torch.empty(3, device="meta"), Inert),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), Inert),
    "a bits dtype": (lambda: torch.empty(2, dtype=torch.uint8).view(torch.bits8), Inert),
    "a quantised parameter": (lambda: torch.nn.Parameter(quantised(), requires_grad=False), Inert),
    "a layout": (lambda: torch.sparse_coo, Inert),
    "a dtype": (lambda: torch.float8_e5m2, GlobalName),
    "a shape": (lambda: torch.Size([2, 3]), Inert),
    "a device": (lambda: torch.device("cuda:1"), Inert),
    "a counter": (lambda: collections.Counter("aab"), Inert),
    "a set": (lambda: {1, 2}, Inert),
    "a complex number": (lambda: 1 + 2j, Inert),
    "bytes that change": (lambda: bytearray(b"abc"), Inert),
    "bytes": (lambda: b"\xff\x00", bytes),
    "a storage": (lambda: torch.ones(2).untyped_storage(), StorageRecord),
    "a storage with a type": (lambda: torch.ones(2).storage(), StorageRecord),
    "a scheme of quantising": (lambda: torch.nn.Identity, GlobalName),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAFE_VALUES)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_s_safe_loader_reads_lies_beside_the_weights(tmp_path, kind, is_zip):
    make, expected = SAFE_VALUES[kind]
    path = saved(tmp_path, {"state_dict": WEIGHTS, "beside": make()}, _use_new_zipfile_serialization=is_zip)
    beside, file = intact(path)
    assert type(beside) is expected
    assert file.calls == ()


def test_parameters_with_state_are_weights(tmp_path):
    marked = {key: with_state(torch.nn.Parameter(value.clone())) for key, value in WEIGHTS.items()}
    intact(saved(tmp_path, {"state_dict": marked}))


ONES = tuple_of(number(1))
OLD = {  # as torch before 0.4 wrote weights, and as Python 2 wrote texts
    "no hooks": tensor(hooks=b"N"),
    "four arguments": call("torch._utils", "_rebuild_tensor", storage(), number(0), ONES, ONES),
    "a parameter that is called": call("torch.nn.parameter", "Parameter", tensor())
    + tuple_of(b"\x88", b"\x89", HOOKS)
    + b"b",
    "a parameter with None for hooks": call("torch._utils", "_rebuild_parameter", tensor(), b"\x88", b"N"),
    "from another device": call(
        "torch._utils", "_rebuild_device_tensor_from_cpu_tensor", tensor(), name("torch", "float32"), text("x"), b"\x89"
    ),
    "the first way to keep a type": call(
        "torch._tensor",
        "_rebuild_from_type",
        name("torch._utils", "_rebuild_tensor_v2"),
        name("torch", "Tensor"),
        tuple_of(storage(), number(0), ONES, ONES, b"\x89", HOOKS),
        b"}",
    ),
    "metadata that say nothing": tensor(extra=dict_of(conj=b"\x89", neg=b"\x89")),
}


@pytest.mark.parametrize("kind", OLD)
def test_weights_of_old_torch_are_read(kind):
    assert type(read(dict_of(weight=OLD[kind])).root["weight"]) is TensorRecord


def test_texts_of_python_2_are_texts_and_its_other_strings_bytes():
    short, long = b"U\x03abc", b"T\x02\x00\x00\x00\xff\x00"
    assert read(b"}(" + short + number(1) + long + number(2) + b"u").root == {"abc": 1, b"\xff\x00": 2}


@pytest.mark.parametrize("full", ["_tensor._rebuild_from_type_v2", "_utils._rebuild_qtensor", "FloatTensor"])
def test_what_is_no_plain_tensor_is_no_weight(full):
    module, _, attribute = f"torch.{full}".rpartition(".")
    contents = read(dict_of(weight=call(module, attribute, tensor(), number(1)), other=tensor()))
    assert type(contents.root["weight"]) is Inert
    assert type(contents.root["other"]) is TensorRecord


# Objects beside the weights


class Color(enum.Enum):
    RED = 1


@dataclass
class Settings:
    rate: float = 0.1

    class Inner:
        pass


Point = collections.namedtuple("Point", "x y")


def activation(x):
    return x


OBJECTS = {  # what people keep in hyper_parameters, and whether a scan is silent about it
    "a loss": (lambda: torch.nn.MSELoss(), True),
    "a loss with weights": (lambda: torch.nn.CrossEntropyLoss(weight=torch.ones(3)), True),
    "a network": (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU()), True),
    "a class of networks": (lambda: torch.nn.Linear, True),
    "a function of torch": (lambda: torch.nn.functional.relu, True),
    "a function in C": (lambda: torch.nn.functional.gelu, True),
    "an optimiser's class": (lambda: torch.optim.AdamW, True),
    "an optimiser": (lambda: torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]), True),
    "a scaler": (lambda: torch.amp.GradScaler("cpu"), True),
    "a distribution": (lambda: torch.distributions.Normal(0.0, 1.0), True),
    "a generator": (lambda: torch.Generator(), True),
    "a data set": (lambda: torch.utils.data.TensorDataset(torch.ones(2)), True),
    "a namespace": (lambda: argparse.Namespace(lr=0.1), True),
    "a simple namespace": (lambda: types.SimpleNamespace(a=1), True),
    "a path": (lambda: pathlib.PurePosixPath("a/b"), True),
    "a date": (lambda: datetime.datetime(2022, 8, 1, tzinfo=datetime.timezone.utc), True),
    "a decimal": (lambda: decimal.Decimal("0.1"), True),
    "a fraction": (lambda: fractions.Fraction(1, 3), True),
    "an address": (lambda: ipaddress.ip_address("127.0.0.1"), True),
    "a pattern": (lambda: re.compile("a+"), True),
    "a unique name": (lambda: uuid.UUID(int=5), True),
    "random numbers": (lambda: [random.Random(0).getstate(), np.random.RandomState(0), np.random.default_rng(0)], True),
    "numpy's numbers": (lambda: [np.float64(1), np.str_("a"), np.complex64(1), np.datetime64("2020-01-01")], True),
    "numpy's arrays": (lambda: [np.ones(3), np.ones(3, "f4,i4"), np.array(["a", None], object), np.ma.ones(2)], True),
    "numpy's types": (lambda: [np.float32, np.dtype("f4"), np.ndarray], True),
    "numpy's functions": (lambda: np.mean, True),
    "a range and a slice": (lambda: [range(3), slice(1, 2), ..., NotImplemented], True),
    "counters": (lambda: [collections.defaultdict(list, a=[1]), collections.deque([1], 5)], True),
    "a dataclass": (lambda: Settings(0.2), True),
    "a dataclass as a key": (lambda: {Color: 1, torch.float32: 2, torch.device("cpu"): 3}, True),
    "a function by name": (lambda: activation, True),
    "a type of a mapping": (lambda: typing.Dict[str, typing.Any], True),  # noqa: UP006 - as settings have it
    "an enumeration": (lambda: Color.RED, False),
    "an enumeration as a key": (lambda: {Color.RED: 1}, False),
    "a named tuple": (lambda: Point(1, 2), False),
    "a class in a class": (lambda: Settings.Inner, False),
    "a method": (lambda: Settings(0.2).__eq__, False),
    "a partial call": (lambda: functools.partial(torch.optim.AdamW, lr=0.1), False),
    "functions by way of their owners": (lambda: [torch.relu, torch.Tensor.add, torch.linalg.norm], True),
    "a version of torch": (lambda: torch.__version__, True),
    "a result of torch": (lambda: torch.max(torch.ones(2, 2), 0), True),
    "errors": (lambda: [ValueError("x"), KeyError, StopIteration], True),
    "types with None": (lambda: [typing.Optional[int], typing.Literal["a"], type(None)], True),  # noqa: UP045
    "plain functions": (lambda: [len, max, sorted, abs, print, math.sqrt, copy.deepcopy], True),
    "plain objects": (lambda: [object(), array.array("f", [1]), time.gmtime(), itertools.count(2), re.I], True),
    "what stands for nothing": (lambda: [dataclasses.MISSING, inspect.Parameter.empty], True),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights_stay_unread_whatever_they_are(tmp_path, kind, protocol):
    make, is_silent = OBJECTS[kind]
    path = saved(tmp_path, {"state_dict": WEIGHTS, "hyper_parameters": {"x": make()}}, pickle_protocol=protocol)
    _, file = intact(path)
    assert (file.calls == ()) is is_silent or (kind == "a class in a class" and protocol >= 4)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_a_loss_beside_the_weights_of_a_stream_stays_unread(tmp_path):
    beside = {"loss": torch.nn.MSELoss(), "network": torch.nn.Sequential(torch.nn.Linear(2, 2))}
    intact(saved(tmp_path, {"state_dict": WEIGHTS, "beside": beside}, _use_new_zipfile_serialization=False))


FOREIGN = ["train.<lambda>", "train.make.<locals>.step", "train.Outer.Inner", "mypkg.run", "__main__.main"]


@pytest.mark.parametrize("full", FOREIGN)
def test_other_people_s_names_are_kept_and_named(full):
    module, _, attribute = full.partition(".")
    contents = read(dict_of(weight=tensor(), other=name(module, attribute)))
    assert (contents.foreign, contents.calls) == ((full,), ())


@pytest.mark.parametrize("inside", ["{}", "{'optimizer': adam}", "{'loss': 1}"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_network_in_the_place_of_the_weights_is_a_program(tmp_path, key, inside):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adam = torch.optim.Adam(network.parameters())
    with torch.enable_grad():
        network(torch.ones(1, 2)).sum().backward()
    adam.step()
    value = {key: network, **eval(inside, {"adam": adam.state_dict()})} if key else network
    with pytest.raises(UnsafeFileError, match=r"whole pickled network.*Linear"):
        open_checkpoint(saved(tmp_path, value))


# What other programs would call


def calls_of(value: bytes) -> tuple[str, ...]:
    return read(dict_of(weight=tensor(), other=value)).calls


PROXY, ARGUMENT = name("paramiko.proxy", "ProxyCommand"), text("touch\x1b x")
WARNED = {
    "by REDUCE": PROXY + tuple_of(ARGUMENT) + b"R",
    "by NEWOBJ": PROXY + tuple_of(ARGUMENT) + b"\x81",
    "by NEWOBJ_EX": PROXY + tuple_of(ARGUMENT) + dict_of(a=number(1)) + b"\x92",
    "as an object with attributes": PROXY + b")\x81" + dict_of(cmd=ARGUMENT) + b"b",
    "as the class of a tensor": call("torch._utils", "_rebuild_wrapper_subclass", PROXY, ARGUMENT),
    "by a helper of numpy": call("numpy.random._pickle", "__generator_ctor", ARGUMENT, PROXY),
    "by torch's helper": call("torch._tensor", "_rebuild_from_type_v2", PROXY, PROXY, tuple_of(ARGUMENT), b"}"),
}


@pytest.mark.parametrize("way", WARNED)
def test_a_class_of_another_package_that_is_called_is_told(way):
    (told,) = calls_of(WARNED[way])
    assert "paramiko.proxy.ProxyCommand" in told
    assert r"touch\x1b x" in told or way in ("as an object with attributes", "by torch's helper")


@pytest.mark.parametrize("args", [(), (text("x"),), (list_of(*100 * [number(1)]), number(10**30), text("a" * 999))])
def test_every_call_of_a_function_is_told_shortly(args):
    (told,) = calls_of(call("mypkg", "run", *args))
    assert told.startswith("mypkg.run(")
    assert len(told) < 200


def test_one_call_of_each_name_is_told_in_order():
    calls = [call("mypkg", f"run{index % 2}", number(index)) for index in range(6)]
    assert calls_of(list_of(*calls)) == ("mypkg.run0(0)", "mypkg.run1(1)")


def made(full: str, state: bytes = b"}", args: bytes = b")") -> bytes:
    """An object as most pickles describe one."""
    module, _, attribute = full.rpartition(".")
    return name(module, attribute) + args + b"\x81" + state + b"b"


def enumerated(full: str, value: bytes) -> bytes:
    module, _, attribute = full.rpartition(".")
    return call(module, attribute, value)


LIGHTNING = "pytorch_lightning."
HARMLESS = {  # what libraries that train leave in their files, by the names they use
    "a callback as a key": b"}" + name(LIGHTNING + "callbacks.model_checkpoint", "ModelCheckpoint") + b"}s",
    "a callback": made(LIGHTNING + "callbacks.early_stopping.EarlyStopping", dict_of(patience=number(3))),
    "Lightning's settings": made(LIGHTNING + "utilities.parsing.AttributeDict") + text("lr") + number(1) + b"s",
    "a state of Lightning": enumerated("lightning.pytorch.trainer.states.TrainerFn", text("fit")),
    "Lightning's own enumeration": enumerated("lightning_fabric.utilities.enums.PrecisionType", text("16")),
    "a configuration": made("omegaconf.dictconfig.DictConfig", dict_of(_content=b"}", _metadata=b"N")),
    "a list of a configuration": made("omegaconf.listconfig.ListConfig", dict_of(_content=b"]")),
    "a node of a configuration": made("omegaconf.nodes.AnyNode", dict_of(_val=number(1))),
    "notes of a configuration": made("omegaconf.base.ContainerMetadata", dict_of(ref_type=name("typing", "Any"))),
    "settings of transformers": made("transformers.training_args.TrainingArguments", dict_of(output_dir=text("x"))),
    "a strategy of transformers": enumerated("transformers.trainer_utils.IntervalStrategy", text("steps")),
    "a network's settings": made("transformers.models.clip.configuration_clip.CLIPTextConfig", dict_of(a=number(1))),
    "a frozen dictionary": call("diffusers.configuration_utils", "FrozenDict") + text("a") + number(1) + b"s",
    "a state of accelerate": made("accelerate.state.PartialState", dict_of(backend=b"N")),
    "a kind of machine": enumerated("accelerate.utils.dataclasses.DistributedType", text("NO")),
    "an adapter's settings": made("peft.tuners.lora.config.LoraConfig", dict_of(r=number(4))),
    "a kind of adapter": enumerated("peft.utils.peft_types.PeftType", text("LORA")),
    "a metric": made("torchmetrics.regression.mse.MeanSquaredError", dict_of(total=tensor())),
    "a schedule of the original": made("ldm.lr_scheduler.LambdaLinearScheduler", dict_of(verbosity_interval=number(0))),
    "an average of weights": made("ldm.modules.ema.LitEma", dict_of(decay=number(1))),
    "a transform": made("torchvision.transforms.transforms.Resize", dict_of(size=number(64))),
    "settings of one's own": made("train.config.Config", dict_of(lr=number(1))),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_libraries_that_train_leave_is_silent(kind):
    assert calls_of(HARMLESS[kind]) == ()


def test_a_function_beside_an_enumeration_is_told():
    assert calls_of(enumerated("transformers.trainer_utils.run", text("x"))) == ('transformers.trainer_utils.run("x")',)


@pytest.mark.parametrize("way", ["REDUCE", "NEWOBJ and BUILD", "OBJ", "INST"])
def test_what_scanners_of_pickles_call_dangerous_gets_no_all_clear(way):
    names = scan_rates.read_names()
    assert len(names) > 500
    safe = {
        f"{module}.{attribute}"
        for module, attribute in names
        if scan_rates.is_safe(scan_rates.ways(module, attribute)[way])
    }
    assert safe <= (scan_rates.PLAIN_VALUES if way == "NEWOBJ and BUILD" else set())


# Beside a zip's own checksum


def test_a_changed_pickle_is_damage(tmp_path):
    whole = saved(tmp_path, {"state_dict": WEIGHTS}).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickle = archive.read(next(entry for entry in archive.namelist() if entry.endswith("data.pkl")))
    start = whole.index(pickle)
    path = tmp_path / "model.ckpt"
    for position in range(start, start + len(pickle), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CorruptFileError, match=r"data\.pkl"):
            open_checkpoint(path)
