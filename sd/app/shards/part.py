"""Which part of a run is this process's: i/n as it is given, or as a scheduler says in the environment."""

import re
from collections.abc import Mapping

from sd.app.errors import UsageError

SCHEDULERS = {  # variables: of the index, of the number, and of the first index; without the last, indices count from 0
    "a Slurm array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", None),
    "a Kubernetes indexed job": ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None),
    "AWS Batch": ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE", None),
    "Cloud Run": ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT", None),
    "torchrun": ("RANK", "WORLD_SIZE", None),
}


def part_of(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """(i, n) of "i/n", where i counts from 1; of "auto" or "auto/n" from the environment. Raises UsageError."""
    match = re.fullmatch(r"(auto|\d{1,9})(?:/(\d{1,9}))?", text.strip())
    if not match or (match[1] != "auto" and match[2] is None):
        raise UsageError(f"--shards {text[:60]} is not a part of the shards. Give i/n, such as 1/8, or auto.")
    if match[1] != "auto":
        index, parts = int(match[1]), int(match[2])
    else:
        index, parts = _of_scheduler(environment, match[2] and int(match[2]))
    if not 1 <= index <= parts:
        parts = max(parts, 1)
        raise UsageError(f"--shards {index}/{parts} is out of range: parts count from 1/{parts} to {parts}/{parts}.")
    return index, parts


def _of_scheduler(environment: Mapping[str, str], parts: int | None) -> tuple[int, int]:
    for scheduler, (index, number, first) in SCHEDULERS.items():
        if not environment.get(index, "").isdigit():
            continue
        if parts is None and not environment.get(number, "").isdigit():
            raise UsageError(
                f"--shards auto: {scheduler} says the index ({index}), but not how many there are. "
                f"Give --shards auto/N, or set {number}."
            )
        place = int(environment[index]) - int(environment.get(first or "", "0"))
        parts = int(environment[number]) if parts is None else parts
        if scheduler == "a Slurm array":
            last, step = environment.get("SLURM_ARRAY_TASK_MAX", ""), int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
            place //= step
            if last.isdigit() and (int(last) - int(environment.get(first, "0"))) // step + 1 != parts:
                raise UsageError(
                    f"--shards auto: the indices of this Slurm array are not {parts} in a row. Give sbatch "
                    f"--array=1-{parts}, or --shards i/n."
                )
        return place + 1, parts
    names = ", ".join(index for index, _, _ in SCHEDULERS.values())
    raise UsageError(f"--shards auto: the environment has none of {names}. Give --shards i/n.")
