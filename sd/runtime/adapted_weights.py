"""What adapters do to the weights of a loaded model, and how that is undone.

Every change is computed from the base weight, which is read from the model's file again. The changes of all adapters
are summed in fp32, added to the base in fp32, and rounded once to the network's precision. So nothing drifts, the order
of adapters does not matter, and nothing is kept twice: only a weight that the file does not have, because it was
trained for example, is kept until the adapters are off.

A changed weight is written to where the network has it, so that compiled programs and captured graphs stay valid. Only
one that the network reads from the mapped file gets memory of its own, which it keeps.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from convert.adapters.adapter import Change
from convert.errors import joined, shown
from convert.files.tensors import as_tensor, in_range
from sd.networks.adapters.weight_change import bias_change, weight_change
from sd.pipeline.errors import SettingError
from sd.pipeline.runner import precision_name
from sd.runtime.weights import Weights, laid_out, one_thread_each

if TYPE_CHECKING:
    from sd.runtime.adapters import AppliedAdapter


class Edit(NamedTuple):
    """What one adapter does to one parameter."""

    adapter: "AppliedAdapter"
    change: Change
    strength: float

    def of(self, base: Tensor, leaf: str) -> Tensor:
        """The change of a "weight" or "bias", in fp32, a new tensor."""
        file, change = self.adapter.opened(), self.change
        parts = {part: as_tensor(file, record).to(base.device) for part, record in change.tensors.items()}
        if leaf == "bias":
            return bias_change(parts, strength=self.strength).reshape(base.shape)
        options = {"on_input": change.on_input, "constraint": change.constraint}
        result = weight_change(change.kind, parts, base, scale=change.scale, strength=self.strength, **options)
        for record in change.tensors.values():
            file.release(record)
        return result


Edits = tuple[Edit, ...]
Stored = Callable[[], Tensor | None]  # reads a parameter from the model's file


@dataclass(kw_only=True)
class Changed:
    """A parameter that adapters have changed.

    chain   the precisions through which the tensor in the file became the base; () if the base is not in the file
    base    what is not in the file, None if there was no such parameter; or the view of the file that stays in place of
            a packed weight; else None, and read again
    dtype   the network's precision when the base was found
    edits   what is applied now
    made_in, placed  the precision of the result; its address and version, to see whether it was changed since
    """

    chain: tuple[torch.dtype, ...]
    base: Tensor | None
    dtype: torch.dtype
    edits: Edits = ()
    made_in: torch.dtype = torch.float32
    placed: tuple[int, int] | None = None

    def copied(self) -> "Changed":
        """For a deep copy of the model, in which a view of the file would be memory of its own."""
        return replace(self, base=None if self.chain or self.base is None else self.base.clone())

    def without_file(self, stored: Callable[[], Tensor]) -> "Changed":
        """For a pickle."""
        return replace(self, base=through(stored(), self.chain) if self.chain else self.base, chain=(), placed=None)


class WeightChanges:
    """Brings the weights of networks to what adapters make of them."""

    def __init__(
        self,
        weights: Weights,
        networks: Mapping[str, nn.Module],
        drop_copies: Callable[[Iterable[nn.Module]], None],
    ):
        self.weights, self.drop_copies = weights, drop_copies
        self.modules = {
            f"{component}.{name}": module
            for component, network in networks.items()
            for name, module in network.named_modules()
        }
        parameters = [parameter for network in networks.values() for parameter in network.parameters()]
        self.users = Counter(parameter.untyped_storage().data_ptr() for parameter in parameters)

    def __call__(self, wanted: Mapping[str, Edits]) -> None:
        """Apply these edits, and no others. After an error, some parameters are changed and others are not.

        Raises SettingError for a result beyond the network's precision.
        """
        now = {name: changed.edits for name, changed in self.weights.changed.items()}
        names = [name for name in {**now, **wanted} if now.get(name, ()) != wanted.get(name, ())]
        modules = {name: self.modules[name.rpartition(".")[0]] for name in names}
        self.drop_copies(each for each in modules.values() if "_packed" in vars(each) or isinstance(each, nn.Conv2d))
        names.sort(key=lambda name: -modules[name].weight.nbytes)  # as `read_parameters` does
        with one_thread_each(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda name: self.set(name, modules[name], wanted.get(name, ())), names):
                pass

    @torch.no_grad()
    def set(self, name: str, module: nn.Module, edits: Edits) -> None:
        """Apply these edits to one parameter, and no others."""
        leaf = name.rpartition(".")[2]
        parameter, changed = getattr(module, leaf), self.weights.changed.get(name)
        dtype = next(each.dtype for each in (module.bias, module.weight) if each is not None)
        stored = cache(partial(self.weights.stored, name))  # read once, and only if needed
        if changed is None or self.is_changed_since(name, stored, module, parameter, changed):
            changed = self.found(name, stored(), parameter, dtype)
        if edits:
            value = self.edited(name, stored, changed, edits, module, dtype)
            self.place(name, module, value, dtype, changed)
            placed = place_of(getattr(module, leaf))
            self.weights.changed[name] = replace(changed, edits=edits, made_in=dtype, placed=placed)
            return
        value = changed.base
        if value is None and changed.chain:
            value = through(stored(), changed.chain)
        if value is None:
            module.register_parameter(leaf, None)
        else:
            self.place(name, module, value, value.dtype if dtype == changed.dtype else dtype, changed)
        self.weights.changed.pop(name, None)

    def found(self, name: str, stored: Tensor | None, parameter: Tensor | None, dtype: torch.dtype) -> Changed:
        """A parameter as it is now: as loaded from the file, or with values of its own, which are kept."""
        if parameter is None:
            return Changed(chain=(), base=None, dtype=dtype)
        own = parameter.dtype
        for chain in ((own,), (self.weights.dtype, own)):
            if stored is not None and torch.equal(through(stored.to(parameter.device), chain), parameter):
                as_in_file = own != dtype and self.is_in_file(name, parameter)  # see `sd.runtime.cpu.packing`
                return Changed(chain=chain, base=parameter.detach() if as_in_file else None, dtype=dtype)
        return Changed(chain=(), base=parameter.detach().cpu(), dtype=dtype)

    def is_changed_since(
        self, name: str, stored: Stored, module: nn.Module, parameter: Tensor | None, changed: Changed
    ) -> bool:
        """Whether something else has changed the values of a parameter since its edits were made."""
        if parameter is None or changed.placed is None:
            return False
        if place_of(parameter) == changed.placed and not parameter.requires_grad:  # some optimisers leave no trace
            return False
        if not all(edit.adapter.is_intact() for edit in changed.edits):
            return False  # nobody can tell any more
        made = self.edited(name, stored, changed, changed.edits, module, changed.made_in)
        return not torch.equal(through(made, (changed.made_in, parameter.dtype)), parameter)

    def edited(
        self, name: str, stored: Stored, changed: Changed, edits: Edits, module: nn.Module, dtype: torch.dtype
    ) -> Tensor:
        """The base with these edits, in fp32. Raises SettingError if it leaves the range of a precision."""
        leaf, device = name.rpartition(".")[2], module.weight.device
        base = stored() if changed.chain else changed.base
        base = module.weight.new_zeros(len(module.weight)) if base is None else base
        base = base.to(device, torch.float32)
        first, *others = (edit.of(base, leaf) for edit in edits)
        total = reduce(Tensor.add_, others, first).add_(base)
        if not in_range(total, dtype):
            names = joined(list(dict.fromkeys(shown(edit.adapter.name) for edit in edits)))
            precision = precision_name(dtype)
            advice = "Use a lower strength." if precision == "fp32" else "Use a lower strength, or fp32."
            raise SettingError("adapters", f"lead out of the range of {precision} in {name}: {names}. {advice}")
        return total

    def place(self, name: str, module: nn.Module, value: Tensor, dtype: torch.dtype, changed: Changed) -> None:
        """Give a module these values in a precision, in the memory that its parameter has if that may be changed."""
        leaf = name.rpartition(".")[2]
        parameter = getattr(module, leaf)
        if parameter is None:
            module.register_parameter(leaf, nn.Parameter(value.to(dtype), requires_grad=False))
            return
        in_file = self.is_in_file(name, parameter)
        is_base = changed.base is not None and parameter.data_ptr() == changed.base.data_ptr()
        shared = in_file or is_base or value is changed.base or self.users[parameter.untyped_storage().data_ptr()] > 1
        if parameter.device.type != "cpu" or (parameter.dtype == dtype and not shared):
            parameter.detach().copy_(value)
            return
        is_whole = value is changed.base and (value.device, value.dtype) == (parameter.device, dtype)
        parameter.data = value if is_whole else laid_out(value, parameter.device, dtype)
        if in_file and changed.chain:  # its bytes in memory are as in the file: nothing is lost
            self.weights.release(name)

    def is_in_file(self, name: str, parameter: Tensor) -> bool:
        return parameter.data_ptr() == self.weights.address(name)


def place_of(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def through(values: Tensor, precisions: Iterable[torch.dtype]) -> Tensor:
    return reduce(Tensor.to, precisions, values)
