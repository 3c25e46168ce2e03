"""A benchmark as text for the terminal."""

import textwrap

from sd.study.architecture.calls import COUNTED
from sd.study.architecture.table import aligned
from sd.study.benchmark.layer_kinds import KINDS
from sd.study.benchmark.measuring import Benchmark, Case, Spread

LEAST = (
    "Least: the time of each call at the best rates above, for its operations or for its bytes, whichever is longer,"
    " with each input read and each output written once in main memory. Caches, and algorithms with fewer"
    " multiplications, can be faster than that."
)


def table(found: Benchmark, model: str, machine: str) -> str:
    """model, machine: one line each, what was measured and on what."""
    best = found.rates
    rates = f"best rates: {giga(best.operations)} GFLOP/s multiplying matrices, {giga(best.bytes)} GB/s copying"
    lines = [model, machine, rates, ""]
    rows = [spread_row("loading", found.load), spread_row("text encoding", found.text)]
    rows += [spread_row("depth estimation", found.depth)] if found.depth else []
    lines += aligned([HEADS, *rows])
    for case in found.cases:
        lines += ["", *case_lines(case)]
    return "\n".join([*lines, "", *textwrap.wrap(LEAST, 110), *textwrap.wrap(f"Operations: {COUNTED}.", 110)])


HEADS = ["", "median s", "shortest", "longest", "measured"]


def spread_row(what: str, spread: Spread) -> list[str]:
    return [
        what,
        *(f"{seconds:.4f}" for seconds in (spread.median, spread.shortest, spread.longest)),
        str(spread.count),
    ]


def case_lines(case: Case) -> list[str]:
    """One size and batch size: times, memory, and a step by kinds of layers."""
    pictures = "one picture" if case.batch_size == 1 else f"{case.batch_size} pictures"
    rows = [
        spread_row("a guided step", case.step),
        spread_row("decoding", case.decode),
        spread_row(f"all, {case.steps} steps", case.total),
    ]
    memory = [f"peak memory of the process: {memory_text(case.own_memory)}"]
    if case.device_memory is not None:
        memory.append(f"on the device: {memory_text(case.device_memory)}")
    return [
        f"{case.width}x{case.height}, {pictures} at a time",
        *aligned([HEADS, *rows]),
        "; ".join(memory),
        f"a step is {giga(case.operations)} GFLOP, at {giga(case.operations_per_second)} GFLOP/s",
        "",
        *aligned(kind_rows(case)),
    ]


def kind_rows(case: Case) -> list[list[str]]:
    profile = case.profile
    rows = [["a step, profiled", "calls", "GFLOP", "ms", "%", "GFLOP/s", "least ms", "times the least"]]
    shares = [(title, profile.kinds[kind]) for kind, title in KINDS.items()]
    for title, share in shares:
        rows.append(kind_row(title, share.calls, share.operations, share.seconds, share.least_seconds, profile.seconds))
    calls = sum(share.calls for _, share in shares)
    total = kind_row("total", calls, profile.operations, profile.seconds, profile.least_seconds, profile.seconds)
    return [*rows, total]


def kind_row(title: str, calls: int, operations: int, seconds: float, least: float, step: float) -> list[str]:
    return [
        title,
        str(calls),
        giga(operations) if operations else "",
        f"{1000 * seconds:,.2f}",
        f"{100 * seconds / step:.1f}",
        giga(operations / seconds) if operations else "",
        f"{1000 * least:,.2f}",
        f"{seconds / least:.2f}" if least else "",
    ]


def memory_text(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.2f} GB"


def giga(value: float) -> str:
    return f"{value / 1e9:,.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
