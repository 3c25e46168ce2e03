"""The results of `benchmark.py`, as text and as plain data."""

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from sd.study.architecture.table import aligned
from sd.study.benchmark.measuring import Spread

COLD, LOAD = "cold start", "load"
TEXT, STEP, DECODE, PICTURES = "text", "step", "decode", "end to end"
WHOLE = "start to picture"
ONCE = "loading"  # the case of measurements that do not depend on the pictures' size
NOTES = (
    "Seconds: median (shortest-longest), and the median as a multiple of the first contender's. GB: the process's peak"
    " memory, own without pages of mapped files, resident with them. Cold start: from the start of the process to its"
    " first finished step; load: from files to networks, libraries already imported."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One unit of work by one contender, measured several times."""

    contender: str
    case: str  # "512x512, batch 1", or ONCE
    what: str  # one of the units above
    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """A contender's peak memory in bytes; None if the system does not report it."""

    contender: str
    case: str
    own: int | None  # without pages of mapped files
    resident: int | None  # with them, since the start of the process


@dataclass(kw_only=True)
class Report:
    machine: dict[str, object]
    settings: dict[str, object]
    versions: dict[str, dict[str, object]] = field(default_factory=dict)  # by contender
    precisions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)  # by case, by contender
    references: dict[str, str] = field(default_factory=dict)  # case -> whose latents the others differ from
    steps: dict[str, int] = field(default_factory=dict)  # case -> of its pictures end to end
    psnr: dict[str, dict[str, float | None]] = field(default_factory=dict)  # likewise, in dB; None: the same picture
    left_out: dict[str, str] = field(default_factory=dict)  # contender -> why
    written: bool = False  # whether the JSON file is ours and may be replaced

    def add(self, contender: str, case: str, what: str, seconds: Iterable[float]) -> None:
        self.rows.append(Row(contender=contender, case=case, what=what, seconds=tuple(seconds)))

    def contenders(self, case: str) -> list[str]:
        """The contenders measured in a case, in the order of their turns."""
        return list(dict.fromkeys(row.contender for row in self.rows if row.case == case))

    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def row(self, contender: str, case: str, what: str) -> Row | None:
        found = (row for row in self.rows if (row.contender, row.case, row.what) == (contender, case, what))
        return next(found, None)

    def ratio(self, row: Row) -> float:
        """Its time as a multiple of the first contender's; above 1 is slower."""
        first = self.row(self.contenders(row.case)[0], row.case, row.what)
        return row.spread.median / first.spread.median

    def over_floor(self, contender: str, case: str) -> float | None:
        """A picture end to end as a multiple of its floor, its steps and its decoding; of each the shortest time."""
        rows = [self.row(contender, case, what) for what in (PICTURES, STEP, DECODE)]
        if None in rows or case not in self.steps:
            return None
        picture, step, decode = (row.spread.shortest for row in rows)
        return picture / (self.steps[case] * step + decode)

    def to_dict(self) -> dict:
        """Plain data for JSON: seconds and bytes."""
        rows = [{**asdict(row), **asdict(row.spread), "ratio": self.ratio(row)} for row in self.rows]
        return {key: value for key, value in asdict(self).items() if key != "written"} | {"rows": rows}


def text(report: Report) -> str:
    """A table for each case, with a line for each contender."""
    machine = report.machine
    processor = f"{machine['device_name']}, {machine['threads']} threads"
    lines = [f"{processor}; {machine['system']}; Python {machine['python']}"]
    for name, versions in report.versions.items():
        programs = ", ".join(f"{program} {version}" for program, version in versions.items() if program != "threads")
        lines.append(f"{name}: {report.precisions[name]}; {programs}")
    for case in report.cases():
        lines += ["", case, *aligned(case_rows(report, case))]
        lines += remarks(report, case)
    for name, reason in report.left_out.items():
        lines += ["", f"left out: {name}: {reason}"]
    return "\n".join([*lines, "", *textwrap.wrap(NOTES, 110)])


def remarks(report: Report, case: str) -> Iterator[str]:
    """What holds for a case beside its table."""
    if differences := report.differences.get(case):
        found = (f"{name} {difference:.1e}" for name, difference in differences.items())
        yield f"difference from the latents of {report.references[case]} after two steps: {', '.join(found)}"
    if psnr := report.psnr.get(case):
        found = (f"{name} {'the same' if decibels is None else f'{decibels:.1f}'}" for name, decibels in psnr.items())
        yield f"PSNR to the picture in fp32 after as many steps, in dB: {', '.join(found)}"
    floors = {name: report.over_floor(name, case) for name in report.contenders(case)}
    found = [f"{name} {ratio:.2f}" for name, ratio in floors.items() if ratio]
    if found:
        floor = f"{report.steps[case]} steps and a decoding"
        yield f"end to end as a multiple of {floor}, by the shortest times: {', '.join(found)}"


def case_rows(report: Report, case: str) -> list[list[str]]:
    units = list(dict.fromkeys(row.what for row in report.rows if row.case == case))
    rows = [["", *(head for unit in units for head in (f"{unit}, s", "", "times")), "own GB", "resident GB"]]
    for contender in report.contenders(case):
        cells = [contender]
        for unit in units:
            row = report.row(contender, case, unit)
            spread = row.spread
            digits = 3 if spread.median >= 0.1 else 5
            cells += [f"{spread.median:.{digits}f}", f"({spread.shortest:.{digits}f}-{spread.longest:.{digits}f})"]
            cells.append(f"{report.ratio(row):.2f}")
        peak = next(peak for peak in report.peaks if (peak.contender, peak.case) == (contender, case))
        rows.append([*cells, *(gigabytes(nbytes) for nbytes in (peak.own, peak.resident))])
    return rows


def gigabytes(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 1e9:.2f}"
