"""What all shards of a run have in common, kept beside them: another run is told apart before it writes anything."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.errors import UsageError
from sd.app.jobs.request import JobRequest, ModelRequest
from sd.app.shards.request import ShardRequest, shard_name

if TYPE_CHECKING:
    from sd.app.shards.store import Store

FILE = "shards.json"
FORMAT = 1
OF_LOADING = ("low_memory", "tiled_vae", "compile", "weights", "prediction", "variant")  # which may change rounding


def facts_of(request: ShardRequest, device: str, precision: str) -> dict:
    """The facts of a run: the lines by their hash, all settings, and every file by its hash.

    Raises UsageError if there are no lines. Reads all lines once.
    """
    digest, number = hashlib.sha256(), 0
    for line in request.lines():
        digest.update(json.dumps(line.settings, sort_keys=True, default=str).encode() + b"\n")
        number += 1
    if not number:
        raise UsageError(f"--from-file {request.source} has no prompts.")
    job = request.job
    facts = {
        "format": FORMAT,
        "prompts": {"file": Path(request.source).name, "lines": number, "sha256": digest.hexdigest()},
        "shards": -(-number // request.size),
        "shard_size": request.size,
        "count": job.count,
        "batch_size": job.batch_size,
        "table": request.table,
        "picture": request.picture,
        "task": job.task,
        "settings": dict(job.settings),
        "model": model_facts(job.model),
        "inputs": input_facts(job),
        "device": device,
        "precision": "int8" if job.model.int8 else precision,
    }
    return json.loads(json.dumps(facts, default=str))


def model_facts(model: ModelRequest) -> dict[str, object]:
    files = {name: file_facts(getattr(model, name)) for name in ("file", "vae", "tiny_vae", "refiner")}
    return {**files, **{name: getattr(model, name) for name in OF_LOADING}}


def input_facts(job: JobRequest) -> dict[str, object]:
    """The picture to begin with and how it is prepared; empty without one."""
    if job.init is None:
        return {}
    files = {name: file_facts(getattr(job, name)) for name in ("init", "mask", "depth")}
    return {**files, **(asdict(job.inputs) if job.inputs else {})}


def file_facts(path: Path | None) -> dict[str, str] | None:
    from convert.files.hashing import file_sha256

    if path is None:
        return None
    return {"name": path.name, **({"sha256": file_sha256(path)} if path.is_file() else {})}


def run_id(facts: Mapping[str, object]) -> str:
    """16 hex digits that stand for the facts, kept in each shard's stats."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def stored_facts(store: "Store") -> dict | None:
    """The facts of the run whose shards are in a place; None if there are none. Raises UsageError for a damaged one."""
    raw = store.read(FILE)
    if raw is None:
        return None
    try:
        facts = json.loads(raw)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("shards"), int):
        raise UsageError(f"{store.shown(FILE)} is not the description of a run in shards, or a damaged one.")
    return facts


def require_same(store: "Store", facts: dict) -> bool:
    """Whether the place has shards of this very run; False if it has none. Raises UsageError for those of another."""
    stored = stored_facts(store)
    if stored is None:
        return False
    if stored == facts:
        return True
    there, here = dict(flat(stored)), dict(flat(facts))
    name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
    what = (
        "other prompts" if name == "prompts.sha256" else f"{name} {said(there.get(name))}, here {said(here.get(name))}"
    )
    raise UsageError(f"{store.shown('')} has shards of another run: {what}. Give another --out, or the same again.")


def flat(facts: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def said(value: object) -> str:
    return "not given" if value is None else str(value)[:60]


def keep(store: "Store", facts: dict) -> None:
    """Write the facts, unless another process of the same run just did."""
    try:
        with store.writing(FILE, new=True) as file:
            file.write(json.dumps(facts, indent=1).encode() + b"\n")
    except FileExistsError:
        if not require_same(store, facts):
            raise


def names_of(facts: Mapping[str, object], number: int) -> tuple[str, str, str]:
    """The files of a shard: pictures, table and stats."""
    name = shard_name(number)
    return f"{name}.tar", f"{name}.{facts['table']}", f"{name}_stats.json"


def stats_of(store: "Store", facts: Mapping[str, object], number: int) -> dict | None:
    """The stats of a shard that is complete: written last, and its files have the sizes that they tell; else None."""
    *files, stats_name = names_of(facts, number)
    try:
        stats = json.loads(store.read(stats_name) or "null")
        same = stats["run"] == run_id(facts)
        return stats if same and all(store.size(name) == stats["files"][name]["bytes"] for name in files) else None
    except (ValueError, TypeError, KeyError):
        return None
