"""The adapters that prompts and flags name: found and checked before weights are read, applied batch by batch."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.adapters.adapter import Adapter, open_adapter, read_adapter, summary
from convert.adapters.facts import COMPONENTS
from convert.adapters.hashes import autov3
from convert.errors import counted, shown, shown_list
from convert.families.few_step_names import advice
from convert.families.few_steps import COUNTING, FewSteps, objection
from convert.files.folder_kinds import CHECKPOINTS
from convert.files.reader import CheckpointFile, errors_named
from sd.app.errors import UsageError
from sd.app.jobs.adapter_folder import find_adapter
from sd.app.jobs.request import Events
from sd.config import ModelConfig
from sd.pipeline.settings import PROMPTS, Settings
from sd.text.prompt_adapters import AdapterUse, from_flag, merged
from sd.text.prompt_syntax import ADAPTER

if TYPE_CHECKING:
    from sd.pipeline.stable_diffusion import StableDiffusion

UNCLOSED = re.compile(r"<(?:lora|lyco):[^\s,<>]{0,60}", re.IGNORECASE)
HYPERNETWORK = re.compile(r"<hypernet:[^<>]{1,100}>", re.IGNORECASE)


@dataclass(frozen=True)
class Adapters:
    """What the jobs of a run name.

    paths  by the names in prompts and flags
    read   by path: what is in the file, for this model
    """

    config: ModelConfig
    paths: Mapping[str, Path]
    read: Mapping[Path, Adapter]

    def uses(self, job: Settings) -> dict[Path, AdapterUse]:
        """What a job uses: each file once, by the first of its names, with the sum of its strengths."""
        first: dict[Path, str] = {}
        for use in job.adapters:
            first.setdefault(self.paths[use.name], use.name)
        uses = merged(use._replace(name=first[self.paths[use.name]]) for use in job.adapters)
        return {self.paths[use.name]: use for use in uses}

    def apply(self, model: "StableDiffusion", job: Settings) -> None:
        """Apply those of a job to a model, and no others. Raises CheckpointError for values that cannot be used."""
        uses = self.uses(job)
        if not (uses or model.adapters):
            return
        from sd.runtime.adapters import OpenAdapter

        given, files = [], []
        try:
            for path, use in uses.items():
                files.append(open_adapter(path))
                adapter = replace(read_named(files[-1], self.config), name=use.name)
                given.append((OpenAdapter(files[-1], adapter, path), use.unet, use.text))
            model.apply(given)
        finally:
            for file in files:
                file.close()

    @property
    def words(self) -> list[tuple[str, Path]]:
        """The words that they bring along, and their files."""
        return [(word, path) for path, adapter in self.read.items() for word in adapter.words]

    def noted(self, job: Settings) -> list[dict[str, object]] | None:
        """What a picture of a job notes of its adapters; None if some are not among these.

        Reads the files, unless their hashes are remembered.
        """
        if any(use.name not in self.paths for use in job.adapters):
            return None
        return [
            {"name": use.name, "autov3": autov3(path), "strength": use.unet, "text_strength": use.text}
            for path, use in self.uses(job).items()
        ]


def read_named(file: CheckpointFile, config: ModelConfig) -> Adapter:
    with errors_named(file):
        return read_adapter(file, config)


def find_adapters(
    jobs: Sequence[Settings], config: ModelConfig, where: Sequence[str] = ("",), *, names_only: bool = False
) -> tuple[list[Settings], Adapters]:
    """The jobs, with names in place of their flags' paths, and the adapters that they name, checked for this model.

    where       what stands before an error about the jobs of each line, which are equally many
    names_only  no name is a path: only the user's folders are searched

    Raises UsageError for one that does not exist, CheckpointError for one that cannot be read or does not fit.
    """
    paths: dict[str, Path] = {}  # by name in a picture's settings
    read: dict[Path, Adapter] = {}
    called: dict[str, str] = {}  # flag -> that name

    origins = [where[number * len(where) // len(jobs)] for number in range(len(jobs))]

    def find(name: str, origin: str) -> Path:
        try:
            path = find_adapter(name, names_only=names_only)
        except UsageError as error:
            raise UsageError(f"{origin}{error}") from None
        if path not in read:
            with open_adapter(path) as file:
                read[path] = read_named(file, config)
        return path

    for job, origin in zip(jobs, origins, strict=True):
        for flag in map(from_flag, job.lora):
            if flag.name not in called:
                path = find(flag.name, origin)
                called[flag.name] = name = flag.name if names_only else _in_brackets(flag.name, path)
                if not paths.setdefault(name, path).samefile(path):
                    both = " and ".join(shown(str(each), 200) for each in (paths[name], path))
                    raise UsageError(f"{origin}two adapters are called {shown(name)}: {both}. Rename one of them.")
    jobs = [_renamed(job, called) for job in jobs]
    for job, origin in zip(jobs, origins, strict=True):
        for use in job.adapters:
            if use.name not in paths:
                paths[use.name] = find(use.name, origin)
    return jobs, Adapters(config, paths, read)


def _in_brackets(given: str, path: Path) -> str:
    """What a prompt calls an adapter that a flag gives: its name in the user's folders, else the file's."""
    is_path = path == Path(given).expanduser() or Path(given).suffix.lower() in CHECKPOINTS
    return (path.resolve().name if path.is_dir() else path.stem) if is_path else given


def _renamed(job: Settings, called: Mapping[str, str]) -> Settings:
    flags = [flag._replace(name=called[flag.name]).as_flag for flag in map(from_flag, job.lora)]
    return replace(job, lora=tuple(flags)) if flags else job


def in_turn(batches: Sequence[list[int]], jobs: Sequence[Settings]) -> tuple[list[list[int]], int, int]:
    """The batches with the same adapters one after the other, those without any first.

    Returns the number of sets of adapters, too, and how often the model's change.
    """
    sets: dict[Hashable, list[list[int]]] = {frozenset(): []}
    for batch in batches:
        sets.setdefault(frozenset(jobs[batch[0]].adapters), []).append(batch)
    filled = {adapters: some for adapters, some in sets.items() if some}
    return [batch for some in filled.values() for batch in some], len(filled), len(filled.keys() - {frozenset()})


# What is said of them


def announce(adapters: Adapters, jobs: Sequence[Settings], events: Events) -> None:
    """What is not applied of each file, and a line for each adapter in use."""
    for path, adapter in adapters.read.items():
        for problem in adapter.problems:
            events.warn(f"{shown(path.name)} {problem}")
        for note in adapter.notes:
            events.note(f"{shown(path.name)} {note}")
    sets = {job.adapters: job for job in jobs}
    uses = {(path, use): None for job in sets.values() for path, use in adapters.uses(job).items()}
    for path, use in uses:
        events.note(line_about(use, adapters.read[path]))


def not_refined(jobs: Sequence[Settings], words: Iterable[str]) -> str | None:
    """What is said of adapters and learned words in pictures whose last steps a refiner takes: it knows neither.

    words  the learned ones in their prompts
    """
    names = dict.fromkeys([*(use.name for job in jobs for use in job.adapters), *words])
    if not names:
        return None
    return (
        f"the refiner works without {shown_list(tuple(names))}: adapters and learned words change the base model only"
    )


def objections(
    adapters: Adapters, jobs: Sequence[Settings], model: tuple[str, FewSteps] | None = None
) -> Iterator[str]:
    """What is said where something for few steps is used with settings that are far from what it is made for.

    model  its name, and what it is, if it is itself for few steps; adapters for few steps come before it
    """
    said = {}
    for job in {(job.adapters, *(getattr(job, name) for name in COUNTING)): job for job in jobs}.values():
        found = [(path.name, few_steps) for path, few_steps in _for_few_steps(adapters, job)]
        for name, few_steps in found or ([model] if model else []):
            if problem := objection(few_steps, job):
                said[f"{shown(name)} {problem}"] = None
    yield from said


def are_consistent(adapters: Adapters, job: Settings) -> bool:
    """Whether an adapter makes the network one that samplers such as lcm are for."""
    return any(few_steps.consistent for _, few_steps in _for_few_steps(adapters, job))


def with_few_steps(
    adapters: Adapters, jobs: Sequence[Settings], given: Sequence[Mapping[str, object]], events: Events
) -> list[Settings]:
    """The jobs with the settings that their adapter for few steps is made for, where the user gave none; it is noted.

    given  the settings that the user gave for each line, which have equally many jobs
    """
    done, said = [], {}
    for number, job in enumerate(jobs):
        found = [(path, kind) for path, kind in _for_few_steps(adapters, job) if kind.for_pictures]
        if len({kind for _, kind in found}) == 1:  # two kinds at once are nobody's recommendation
            path, kind = found[0]
            changes = kind.completing(given[number * len(given) // len(jobs)])
            job = replace(job, **changes)
            values = {name.replace("_", "-"): value for name, value in changes.items() if value is not None}
            flags = [f"--{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in values.items()]
            if flags:
                said[f"{shown(path.name)} is {kind.title}: using {' '.join(flags)}"] = None
        done.append(job)
    for line in said:
        events.note(line)
    return done


def _for_few_steps(adapters: Adapters, job: Settings) -> Iterator[tuple[Path, FewSteps]]:
    """The adapters of a picture that are for few steps, and what they are made for."""
    for path, use in adapters.uses(job).items():
        few_steps = advice(adapters.read[path].name, adapters.read[path].metadata) if use.unet else None
        if few_steps:
            yield path, few_steps


def line_about(use: AdapterUse, adapter: Adapter) -> str:
    """ "lora detail: 264 modules (192 UNet, 72 text encoder), rank 32, alpha 16, strength 0.8" """
    changes = adapter.changes
    counts = Counter(change.target.partition(".")[0] for change in changes)
    where = ", ".join(f"{counts[name]} {title}" for name, title in COMPONENTS.items() if counts[name])
    ranks, alphas = ({getattr(change, name) for change in changes} - {None} for name in ("rank", "alpha"))
    facts = [f"{counted(len(changes), 'module')}{f' ({where})' if where else ''}"]
    facts += [] if {change.kind for change in changes} == {"lora"} else [summary(changes)]
    facts += [f"{name} {_span(values)}" for name, values in (("rank", ranks), ("alpha", alphas)) if values]
    facts += [f"the words {shown_list(tuple(adapter.words))}"] if adapter.words else []
    facts.append(f"strength {use.unet:g}" + (f" (text encoder {use.text:g})" if use.text != use.unet else ""))
    return f"lora {shown(use.name)}: {', '.join(facts)}"


def _span(values: set[float]) -> str:
    lowest, highest = min(values), max(values)
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"


def others_of(job: Settings) -> tuple[str, ...]:
    """The prompts of a picture that are read, beside the one that can name adapters."""
    return (job.prompt_2, job.negative_prompt, job.negative_prompt_2) if job.guided else (job.prompt_2,)


def misread(jobs: Sequence[Settings]) -> Iterator[str]:
    """What looks like an adapter in a prompt, and is read as words."""

    def found(pattern: re.Pattern, texts: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(name for text in texts for name in pattern.findall(text)))

    if names := found(ADAPTER, (job.prompt for job in jobs if job.plain_prompts)):
        yield f"with --plain-prompts, brackets are words: {names}. Use --lora for adapters."
    if names := found(UNCLOSED, (job.prompt_text for job in jobs if not job.plain_prompts)):
        yield f"read as words, for want of a closing >: {names}"
    if names := found(ADAPTER, (text for job in jobs for text in others_of(job))):
        yield f"adapters in a negative or second prompt are read as words: {names}. Name them in the prompt."
    if names := found(HYPERNETWORK, (text for job in jobs for text in (getattr(job, name) for name in PROMPTS))):
        yield f"hypernetworks are not supported yet, and are read as words: {names}"
