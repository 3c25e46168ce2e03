"""Whether a run in shards is complete, and every file as it was written."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sd.app.errors import UsageError
from sd.app.shards.facts import FILE, names_of, run_id, stored_facts
from sd.app.shards.maker import key_of
from sd.app.shards.request import shard_name
from sd.app.shards.store import Store

CHUNK = 4 << 20


@dataclass(frozen=True)
class Verdict:
    """state: "right", "missing" or "damaged", and why; the last also where pictures could not be made."""

    shard: str
    state: str
    pictures: int = 0
    problem: str = ""


def verify(store: Store) -> Iterator[Verdict]:
    """Read all shards of a run, one by one. Raises UsageError if there is no run."""
    facts = stored_facts(store)
    if facts is None:
        raise UsageError(f"{store.shown(FILE)} does not exist: there is no run in shards. Give the folder of --out.")
    there = store.names()
    for number in range(facts["shards"]):
        yield verdict_on(store, facts, number, there)
    known = {name for number in range(facts["shards"]) for name in names_of(facts, number)}
    for name in sorted(there - known - {FILE}):
        if name.endswith((".tar", ".jsonl", ".parquet", "_stats.json")) and not name.startswith("."):
            yield Verdict(name.partition(".")[0], "damaged", problem=f"{name} is not part of this run")


def verdict_on(store: Store, facts: Mapping[str, object], number: int, there: set[str]) -> Verdict:
    tar_name, table_name, stats_name = names_of(facts, number)
    name, per_line = shard_name(number), facts["count"]
    first = number * facts["shard_size"]
    keys = [
        key_of(i)
        for i in range(first * per_line, min(first + facts["shard_size"], facts["prompts"]["lines"]) * per_line)
    ]
    if stats_name not in there:
        return Verdict(name, "missing")
    try:
        stats = json.loads(store.read(stats_name) or b"")
        expected, failed = {n: (f["bytes"], f["sha256"]) for n, f in stats["files"].items()}, stats["failed"]
        same = stats["run"] == run_id(facts)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Verdict(name, "damaged", problem=f"{stats_name} cannot be read")
    if not same:
        return Verdict(name, "damaged", problem=f"{stats_name} is of another run")
    for file in (tar_name, table_name):
        if file not in there:
            return Verdict(name, "damaged", problem=f"{file} is missing")
        if hash_of(store, file) != expected.get(file):
            return Verdict(name, "damaged", problem=f"{file} is not what was written")
    if problem := samples_problem(store, tar_name, facts["picture"], set(keys) - set(failed)):
        return Verdict(name, "damaged", problem=f"{tar_name}: {problem}")
    problem = f"could not make {', '.join(f'{key}: {why}' for key, why in failed.items())}" if failed else ""
    return Verdict(name, "right", len(keys) - len(failed), problem)


def hash_of(store: Store, name: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with store.open(name) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def samples_problem(store: Store, name: str, picture: str, keys: set[str]) -> str:
    """What is wrong with the samples of a tar: each key once, with a picture that has the hash told; "" if nothing."""
    found: dict[str, dict[str, bytes]] = {}
    seen = set()
    with store.open(name) as file, tarfile.open(fileobj=io.BufferedReader(file), mode="r|") as tar:
        for entry in tar:
            key, _, ending = entry.name.partition(".")
            sample = found.setdefault(key, {})
            if key in seen or ending in sample:
                return f"{entry.name} is there twice"
            sample[ending] = tar.extractfile(entry).read()
            if len(sample) == 3:
                told = json.loads(sample["json"])["sha256"]
                if hashlib.sha256(sample[picture]).hexdigest() != told:
                    return f"{key}.{picture} is not the picture that {key}.json tells of"
                seen.add(key)
                del found[key]
    if found or seen != keys:
        return f"{len(keys - seen)} samples are missing, {len(seen - keys)} do not belong there"
    return ""
