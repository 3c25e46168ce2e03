"""What is in a file, for a page or a script. Nothing in it is executed, and torch is not needed.

By default it reads only names, shapes and offsets, so it is fast whatever the size of the file.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.parts import Part, parts_beside, parts_of
from convert.actions.tensor_set import everything, original_weights, set_sha256, tensor_digests, tensors_of
from convert.adapters.adapter import is_adapter_folder, open_adapter
from convert.adapters.facts import AdapterFacts, adapter_facts
from convert.adapters.image_card import is_picture
from convert.adapters.word_facts import WordFacts, word_facts
from convert.checkpoint import WHOLE, Checkpoint, read_checkpoint
from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError
from convert.families.additions import EMBEDDING
from convert.families.family import ALONE
from convert.families.few_step_names import NOT_TOLD, model_advice
from convert.families.recognition import ADAPTERS, Recognised, describe
from convert.families.table import MODELS, family_named
from convert.files.hashing import file_sha256, old_hash, remembered_sha256
from convert.files.reader import CheckpointFile, open_checkpoint
from convert.files.records import DTYPE_WIDTHS, TensorRecord
from convert.layouts.noise_schedule import PREDICTIONS, SCHEDULER, Evidence, Statement, statement
from convert.layouts.original_layout import networks_in
from convert.layouts.wrapping import plain_names, unwrap
from convert.published.known import find_by_sha256
from convert.single_part import read_part
from sd.config import SD_V1, ScheduleConfig

if TYPE_CHECKING:
    from convert.actions.values import Values

NUMBERS = ("global_step", "epoch")
EMBEDDINGS = ("embedding", "sdxl-embedding")
QUICK = 512 << 20  # bytes of an adapter that are read for its hash unasked


@dataclass(frozen=True, kw_only=True)
class Report:
    """A description of a file. Unknown fields are None or empty."""

    path: str
    bytes: int
    container: str | None = None  # "torch zip", "safetensors"; None where the file was refused
    safe: bool  # it names no code and has no structure that only a hostile file has
    foreign: tuple[str, ...] = ()  # classes that the pickle names and that are not needed; kept as inert data
    calls: tuple[str, ...] = ()  # what other programs would call on loading it; here nothing is called
    passed_over: tuple[str, ...] = ()  # what changes no weight: stray records, bytes behind the end
    dangerous: tuple[str, ...] = ()  # names of code that has no place in a checkpoint
    problem: str | None  # why it is not usable as a model
    part: str | None = None  # a key of ALONE: complete, and all that there is
    kind: str | None = None
    evidence: tuple[str, ...] = ()
    family: str | None = None  # of a complete model: as `convert.families.family` names it
    layout: str | None = None
    dropped: tuple[str, ...] = ()  # words and prefixes that frameworks put into the names; they are read without
    prediction: str | None = None  # what the UNet predicts: "eps" or "v"; None without a UNet, and where nothing tells
    prediction_because: str | None = None  # the evidence: "m.yaml beside it"
    schedule: ScheduleConfig | None = None  # the noise levels of the training
    zero_terminal_snr: bool | None = None  # they end in pure noise
    native_size: int | None = None  # of a complete model: side of the training pictures, in pixels
    guidance_scale: float | None = None  # of its pictures that ask for no other
    warnings: tuple[str, ...] = ()  # what may spoil the pictures
    notes: tuple[str, ...] = ()
    weights: str | None = None  # which of the UNet's are used: "model" or "ema"
    other_weights: str | None = None
    precision: str | None = None  # of the weights in use: "float32", "float16+float32"
    components: tuple[Part, ...] = ()
    leftovers: tuple[Part, ...] = ()
    ema_decay: float | None = None
    ema_updates: int | None = None
    global_step: int | None = None
    epoch: int | None = None
    metadata: dict[str, str] | None = None
    old_hash: str | None  # the short hash of older tools, over 64 KiB of the file; None for a short file
    sha256: str | None
    known: str | None = None  # the original checkpoint that has this sha256
    tensors_sha256: str | None = None  # over the weights of the model or part; without one, over all tensors
    everything_sha256: str | None = None  # including the tensors beside the model
    values: "Values | None" = None
    word: WordFacts | None = None  # of an embedding that prompts can use
    adapter: AdapterFacts | None = None  # of a LoRA or a relative that can be applied to a model
    tiny_vae: tuple[str, ...] = ()  # the halves of a tiny VAE that can be used: "decoder", "encoder"


def inspect(
    path: Path,
    *,
    hashed: bool = False,
    tensors_hashed: bool = False,
    deep: bool = False,
    variant: str | None = None,
) -> Report:
    """Describe a file.

    hashed          read it for its sha256, unless the hash is cached
    tensors_hashed  read it for the hash of its tensors (`convert.actions.tensor_set`)
    deep            both, and look at every number
    variant         of a folder's weights, as in `open_checkpoint`

    Raises CorruptFileError, UnsupportedFileError for what is damaged or no checkpoint; OSError. Unsafe files and files
    without a complete model are described.
    """
    sha256 = file_sha256(path) if (hashed or deep) and path.is_file() else None
    if is_picture(path) and isinstance(facts := word_facts(path), WordFacts):
        return Report(
            path=str(path),
            bytes=path.stat().st_size,
            container="a picture",
            safe=True,
            problem="is a picture with an embedding in it, not a checkpoint.",
            kind=EMBEDDING.title,
            old_hash=None,
            sha256=file_sha256(path),
            word=facts,
        )
    try:
        file = open_adapter(path) if is_adapter_folder(path) else open_checkpoint(path, variant=variant)
    except UnsafeFileError as error:
        return Report(
            path=str(path),
            bytes=path.stat().st_size,
            safe=False,
            dangerous=error.names,
            problem=str(error),
            old_hash=old_hash(path) if path.is_file() else None,
            sha256=sha256 or remembered_sha256(path),
        )
    with file:
        report = _describe(path, file, sha256 or remembered_sha256(path), hashed=hashed or deep)
        if deep or tensors_hashed:
            tensors = tensors_of(file.root)
            if deep:
                from convert.actions.values import look_at_values  # numpy takes a tenth of a second to import

                report = replace(report, values=look_at_values(file, tensors))
            if not (report.values and report.values.damaged):
                checkpoint = _read(file)[0] or (read_part(file, report.part) if report.part else None)
                report = replace(report, **_hashes(file, checkpoint, tensors))
        return report


def _describe(path: Path, file: CheckpointFile, sha256: str | None, *, hashed: bool) -> Report:
    tensors, dropped = tensors_of(file.root), ()
    with suppress(CheckpointError):  # told as the problem
        plain, dropped = plain_names(tensors)
        tensors = {plain[name]: record for name, record in tensors.items()}
    kind = describe({name: record.shape for name, record in tensors.items()})
    checkpoint, problem = _read(file)
    alone, adapter = None if checkpoint else _read_alone(file), None
    if kind.family and kind.family.name in ADAPTERS:
        hashed = hashed or file.size <= QUICK
        sha256 = file_sha256(path) if hashed and path.is_file() else sha256
        facts = adapter_facts(path, file, hashed=hashed)
        adapter, problem = (None, facts) if isinstance(facts, str) else (facts, problem)
    tiny_vae = ()
    if kind.family and kind.family.name == "taesd":
        from convert.tiny_vae import read_tiny_vae

        try:
            tiny_vae = read_tiny_vae(file).halves
        except CheckpointError as error:
            problem = str(error)
    word, name = None, kind.name
    seen = kind.family and kind.family.config
    if checkpoint and (not seen or seen.family != checkpoint.config.family):
        name = family_named(checkpoint.config.family).title  # metadata or settings know more than names and shapes
    in_dictionary = isinstance(file.root, dict) and "string_to_param" in file.root
    if path.is_file() and checkpoint is None and (in_dictionary or (kind.family and kind.family.name in EMBEDDINGS)):
        sha256, facts = file_sha256(path), word_facts(path)
        word, problem = (None, facts) if isinstance(facts, str) else (facts, problem)
        name = EMBEDDING.title if in_dictionary else name
    components, leftovers = parts_of(tensors, kind, averaged=checkpoint is not None and checkpoint.weights == "ema")
    beside = _numbers_beside(file.root, file.metadata)
    known = find_by_sha256(sha256)
    said = _statement(file, tensors, kind, checkpoint or alone, beside.get("global_step"))
    return Report(
        path=str(path),
        bytes=file.size,
        container=file.container,
        safe=True,
        foreign=file.foreign,
        calls=file.calls,
        passed_over=file.passed_over,
        problem=problem,
        kind=name,
        evidence=(*kind.evidence, *kind.details),
        family=checkpoint and checkpoint.config.family,
        part=alone and alone.part,
        layout=(checkpoint or alone) and (checkpoint or alone).layout,
        dropped=dropped,
        prediction=said and said.prediction,
        prediction_because=said and said.why,
        schedule=said and said.schedule,
        zero_terminal_snr=said and said.ends_in_noise,
        native_size=checkpoint and checkpoint.config.native_size,
        guidance_scale=checkpoint and checkpoint.config.guidance_scale,
        warnings=said.warnings if said else (),
        notes=(*file.notes, *(said.notes if said else ()), *_few_step_notes(file, checkpoint or alone, sha256)),
        weights=checkpoint and checkpoint.weights,
        other_weights=checkpoint and checkpoint.other_weights,
        precision="+".join(sorted({dtype for part in components for dtype in part.dtypes})) or None,
        components=components,
        leftovers=(*leftovers, *parts_beside(file.root)),
        ema_decay=_scalar(file, tensors.get("model_ema.decay"), "float32", "f"),
        ema_updates=_scalar(file, tensors.get("model_ema.num_updates"), "int32", "i"),
        global_step=beside.get("global_step"),
        epoch=beside.get("epoch"),
        metadata=file.metadata or None,
        old_hash=old_hash(path) if path.is_file() else None,
        sha256=sha256,
        known=known and known.file,
        adapter=adapter,
        word=word,
        tiny_vae=tiny_vae,
    )


def _few_step_notes(file: CheckpointFile, checkpoint: Checkpoint | None, sha256: str | None) -> Iterator[str]:
    """What a model for few steps is, and with which settings; that nothing tells, where models alike may be one."""
    if checkpoint is None or checkpoint.part not in (None, "unet"):
        return
    told = model_advice(file.called, file.metadata, checkpoint.config, sha256)
    if told:
        yield told.note
    elif checkpoint.config.family == "sdxl" and not (find_by_sha256(sha256) or checkpoint.said.levels):
        yield NOT_TOLD


def _statement(
    file: CheckpointFile,
    tensors: Mapping[str, TensorRecord],
    kind: Recognised,
    checkpoint: Checkpoint | None,
    step: int | None,
) -> Statement | None:
    """What the UNet was trained to predict, also in families that cannot be loaded; None without a UNet."""
    if checkpoint and checkpoint.part in (None, "unet"):
        return checkpoint.said
    if kind.family not in MODELS or "UNet" not in kind.parts:
        return None
    stated = file.configs.get("scheduler", {}).get("prediction_type", "epsilon")
    own = Evidence(PREDICTIONS.get(str(stated), "eps"), SCHEDULER) if "scheduler" in file.configs else None
    try:
        return statement(file, tensors, SD_V1.schedule, usual=kind.family.prediction, step=step, own=own)
    except CheckpointError:
        return None  # it predicts the picture; why that is not usable is in the report


def _read(file: CheckpointFile) -> tuple[Checkpoint | None, str | None]:
    """The model, or why the file holds none."""
    try:
        return read_checkpoint(file), None
    except CheckpointError as error:
        return None, str(error)


def _read_alone(file: CheckpointFile) -> Checkpoint | None:
    """The one network that a file holds complete, if it holds one."""
    found = []
    for part in ALONE:
        try:
            found.append(read_part(file, part))
        except CheckpointError:
            continue
    return found[0] if len(found) == 1 else None


def _hashes(file: CheckpointFile, checkpoint: Checkpoint | None, tensors: dict[str, TensorRecord]) -> dict[str, str]:
    """The hashes of the report, in one reading."""
    if not checkpoint:
        return {"tensors_sha256": set_sha256(tensor_digests(file, tensors))}
    weights = original_weights(checkpoint)
    digests = tensor_digests(file, everything(checkpoint))
    hashes = {"tensors_sha256": set_sha256(entry for entry in digests if entry[0] in weights)}
    return hashes | ({"everything_sha256": set_sha256(digests)} if checkpoint.extras else {})


def _numbers_beside(root: object, metadata: dict[str, str]) -> dict[str, int]:
    """`global_step` and `epoch`, from the outermost dictionary that has them, or from the metadata of ours."""
    numbers = {name: int(text) for name, text in metadata.items() if name in NUMBERS and WHOLE.fullmatch(text)}
    with suppress(CheckpointError):
        found = unwrap(root, networks_in).beside
        numbers = {name: found[name] for name in NUMBERS if name in found} | numbers
    return numbers


def _scalar(file: CheckpointFile, record: TensorRecord | None, dtype: str, code: str) -> float | int | None:
    """The one number in a tensor; None if it is missing or not usable."""
    if record is None or record.numel != 1 or record.dtype != dtype or record.storage.nbytes > 1 << 20:
        return None
    try:
        file.verify(record)
        data = file.storage_bytes(record)
    except CorruptFileError:
        return None
    order = ">" if record.storage.byteorder == "big" else "<"
    value = struct.unpack_from(order + code, data, record.offset * DTYPE_WIDTHS[dtype])[0]
    return value if math.isfinite(value) else None
