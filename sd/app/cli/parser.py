"""The parser of every command: a short page of help and a long one, and errors that say what to do."""

import argparse
import difflib
import shlex
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from convert.errors import joined
from sd.app.cli.elsewhere import USE_INSTEAD
from sd.app.errors import UsageError
from sd.pipeline.errors import nearest

Add = Callable[..., argparse.Action]  # `add_argument` of a parser or of a group of flags
LONG_DASHES = ("\u2013", "\u2014")  # which word processors make of hyphens
PICTURES = ("txt2img", "img2img", "inpaint", "depth2img", "edit")  # commands that have most of their flags in common
NUMBERS = {int: "a whole number", float: "a number"}

# flags that only --help-all shows
RARE = """
    --debug --prompt --prompt-file --plain-prompts --weights --precision --low-memory --tiled-vae --compile --clip-skip
    --schedule --sigmas --zero-terminal-snr --no-zero-terminal-snr --eta --plms --guidance-rescale
    --guidance-interval --reuse-features --merge-tokens --vary --vary-seed --n_iter --grid-columns --save-steps
    --save-steps-as --hires-upscale --hires-strength --hires-steps --exact-steps --resize-mode --mask-threshold
    --mask-blur --mask-padding --masked-content --overlap --prediction --variant --rng --seed-delta
    --discard-penultimate --max-megapixels --prompt-2 --negative-prompt-2 --original-size --crop --refiner --switch-at
    --switch-by --aesthetic-score --negative-aesthetic-score --tiny-vae --choices
    --wildcards --shard-size --shards --shard-table --shard-picture
    --engine --address --workers --gpus-per-worker --cpus-per-worker
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a sentence, with the nearest flag for one that does not exist."""

    def __init__(self, *, usual: Sequence[str] = (), **options):
        """usual: flags that are rare elsewhere, but not in this command"""
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=Formatter, **options)
        self.usual = usual
        self.words: list[str] = []  # of the command line that is being parsed
        self.add_argument("-h", "--help", action=Help, nargs=0, help="show this help")
        self.add_argument("--help-all", action=Help, nargs=0, help="show all flags, with all their spellings")
        self.add_argument("--debug", action="store_true", help="show a traceback where something fails")

    def group(self, title: str) -> Add:
        """A new group of flags: the function that adds one to it."""
        return self.add_argument_group(title).add_argument

    def page(self, *, whole: bool) -> str:
        """The help: usage in one line, examples, and the flags. Without `whole`, those of RARE are left out."""
        rare = set() if whole else {*RARE.split()} - {*self.usual}
        examples, _, after = (self.epilog or "").partition("\n\n")
        formatter = Formatter(self.prog, every_spelling=whole)
        formatter.add_text(self.description)
        formatter.add_text(examples)
        for group in self._action_groups:
            title = {"positional arguments": "arguments", "options": "flags"}.get(group.title, group.title)
            formatter.start_section(title)
            formatter.add_arguments([a for a in group._group_actions if long_flag(a.option_strings) not in rare])
            formatter.end_section()
        formatter.add_text(after)
        return f"{self.format_usage()}\n{formatter.format_help()}"

    def format_help(self) -> str:
        return self.page(whole=False)

    def format_usage(self) -> str:
        """One line: the words that must be given, in brackets those that may be."""
        words = []
        for action in sorted(self._actions, key=lambda action: bool(action.option_strings)):
            if not action.option_strings:
                name = f"{action.metavar} ..." if action.nargs in ("+", argparse.PARSER) else str(action.metavar)
                words.append(f"[{name}]" if action.nargs == "?" else name)
            elif action.required:
                words.append(f"{long_flag(action.option_strings)} {action.metavar}")
        return f"usage: {' '.join([self.prog, *words])} [FLAGS]\n"

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            given = next((word for word in unknown if word.startswith("-")), unknown[0])
            raise UsageError(f"{self._unknown(given)} See {self.prog} --help.")
        return found

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self.words = words = [str(word) for word in args or ()]
        flags = words[: words.index("--")] if "--" in words else words
        for word in flags:
            known = self._option_string_actions
            if word.startswith("-") and word not in known and f"-{word}" in known:
                raise UsageError(f"{word} is not a flag of {self.prog}. Did you mean -{word}?")  # not -s teps
        # a flag whose value may be left out takes the next word only if that is one of its choices
        read = list(words)
        for i, after in enumerate(flags[1:]):
            action = self._optional(words[i])
            if action and after not in action.choices:
                read[i] = f"{words[i]}={action.const}"
        return super().parse_known_args(read, namespace)

    def _optional(self, word: str) -> argparse.Action | None:
        """The flag, if it is one whose value may be left out."""
        action = self._option_string_actions.get(word)
        return action if action and action.nargs == "?" and action.choices else None

    def error(self, message: str) -> NoReturn:
        """argparse's message, in our words."""
        kind, _, names = message.partition(": ")
        flag = long_flag(kind.removeprefix("argument ").split("/"))
        if kind == "the following arguments are required":
            missing = [long_flag(name.split("/")) for name in names.split(", ")]
            message = f"{' and '.join(missing)} must be given."
            flags = [word for word in self.words if word.startswith("--") and word != "--"]
            if unknown := [word for word in flags if word.partition("=")[0] not in self._option_string_actions]:
                message = self._unknown(unknown[0])  # which is often what is missing, by another name
        elif names.startswith("expected"):
            message = f"{flag} needs a value.{self._dashed_value(flag)}"
        elif names.startswith("ignored explicit argument"):
            message = f"{flag} takes no value, got {names.rpartition('argument ')[2]}."
        raise UsageError(f"{message}{'' if message[-1] in '.?' else '.'} See {self.prog} --help.")

    def _dashed_value(self, flag: str) -> str:
        """How to give a value that begins with a dash, where the word after the flag does."""
        for word, after in zip(self.words, self.words[1:], strict=False):
            action = self._option_string_actions.get(word)
            dashed = after.startswith("-") and after not in self._option_string_actions
            if dashed and action and flag == long_flag(action.option_strings):
                return f" If {after} is its value, write {shlex.quote(f'{word}={after}')}."
        return ""

    def _unknown(self, given: str) -> str:
        if given.startswith("-") and "--" in self.words[: self.words.index(given)]:
            return f"{given} stands after --, where every word is text. Put flags before it."
        if not given.startswith("-"):
            if long := next((word for word in self.words if word.startswith(LONG_DASHES)), None):
                return f"{long} begins with a long dash. Did you mean --{long.lstrip('-' + ''.join(LONG_DASHES))}?"
            for flag, after in zip(self.words, self.words[1:], strict=False):
                action = self._optional(flag)
                if action and not after.startswith("-") and after not in action.choices:
                    return f"{flag} {after} {nearest(after, action.choices)}"
            return f"unexpected word {given!r}. Put text that has spaces in quotes."
        flag = given.partition("=")[0]
        return f"{given} is not a flag of {self.prog}. {self._instead_of(flag)}".rstrip()

    def _instead_of(self, flag: str) -> str:
        """What to use instead of a flag that does not exist: by another program's name for it, else by its spelling."""
        ours = {*self._option_string_actions} - {"--force"}
        plain = flag.replace("_", "-").lower()
        if same := [name for name in ours if name.replace("_", "-").lower() == plain]:
            return f"Did you mean {same[0]}?"
        needs, hint = USE_INSTEAD.get(plain, ("", ""))
        if hint and (not needs or needs in ours):
            return hint
        if others := [name for name in PICTURES if self.prog.split()[-1] in PICTURES and flag in flags_of(name)]:
            return f"It is a flag of {joined([f'sd {name}' for name in others])}."
        near = difflib.get_close_matches(flag, ours, n=1)
        return f"Did you mean {near[0]}?" if near else ""

    def _get_value(self, action: argparse.Action, text: str) -> object:
        """The value of a flag; what is wrong with it in our words."""
        name = long_flag(action.option_strings) or action.metavar
        try:
            return (action.type or str)(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name} {error}. See {self.prog} --help.") from None
        except ValueError:
            kind = NUMBERS.get(action.type, "a value that it takes")
            raise UsageError(f"{name} {text[:60]!r} is not {kind}. See {self.prog} --help.") from None

    def _check_value(self, action: argparse.Action, value: str) -> None:
        """What argparse does with the choices of a flag, in our words."""
        if action.choices is not None and value not in action.choices:
            name = long_flag(action.option_strings) or action.metavar or action.dest
            raise UsageError(f"{name} {value[:60]} {nearest(value, action.choices)} See {self.prog} --help.")


class Help(argparse.Action):
    """--help, and --help-all."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.page(whole=option_string == "--help-all"), end="")
        parser.exit()


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Flags in columns; only the first short and long spelling of each, unless all are asked for."""

    def __init__(self, prog: str, *, every_spelling: bool = False, **options):
        super().__init__(prog, max_help_position=32, **options)
        self.every_spelling = every_spelling

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = action.option_strings
        if not names:
            return super()._format_action_invocation(action)
        if not self.every_spelling:
            short = [name for name in names if not name.startswith("--")][:1]
            names = [*short, *(name for name in [long_flag(names)] if name not in short)]
        usual = self._get_default_metavar_for_optional(action)
        return ", ".join(names) + ("" if action.nargs == 0 else f" {self._format_args(action, usual)}")


def long_flag(spellings: Sequence[str]) -> str:
    """Our spelling of a flag: the first long one."""
    return next((flag for flag in spellings if flag.startswith("--")), spellings[0] if spellings else "")


def flags_of(command: str) -> dict[str, argparse.Action]:
    """Every spelling of every flag of a command."""
    return import_module(f"sd.app.cli.{command}").parser()._option_string_actions
