"""Names of weights, and what wrappers and training scripts put before all of them."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any, TypeVar

from coconv_surgery.planning.notes import is_guard

_T = TypeVar("_T")
_WRAPPERS = ("_orig_mod", "module", "_orig_mod")  # torch.compile and data parallelism, as timm takes them off
_DEEPEST = 8  # in how many modules a network may be held: more is no training script's


def prefix_of(weights: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> str:
    """What is put before all names of some weights: nothing, or modules, each with its dot.

    Args:
        weights: The weights.
        own: Those of the network that they are to be loaded into. Default: what a wrapper puts there is taken for that.

    Returns:
        The prefix without which the most names are the network's; the shortest of several, so nothing where the names
        are its own as they are.
    """
    parts = _in_common([name for name in weights if not (is_guard(name) or _is_counter(name))])[:_DEEPEST]
    prefixes = list(accumulate(parts, "{}{}.".format, initial=""))
    if own is None:
        return prefixes[_wrappers(parts)]
    return max(prefixes, key=lambda prefix: len(without(prefix, weights).keys() & own.keys()))


def without(prefix: str, entries: Mapping[str, _T]) -> dict[str, _T]:
    """Entries under the names that are left, of those that have the prefix: a wrapper's own have not."""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def fit(weights: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[int, int, int]:
    """How well some weights fit a network, whatever is put before their names: the larger, the better.

    Args:
        weights: The weights.
        own: Those of the network.

    Returns:
        How many are of the same shape, how many have names of the network, and how many they are, negated.
    """
    found = without(prefix_of(weights, own), weights)
    alike = [name for name in found if name in own]
    shapes = [getattr(found[name], "shape", None) == getattr(own[name], "shape", None) for name in alike]
    return sum(shapes), len(alike), -len(found)


def _is_counter(name: str) -> bool:
    """Whether it is of how many networks AveragedModel has made its average, beside which it holds that."""
    return name.rpartition(".")[2] == "n_averaged"


def _in_common(names: Sequence[str]) -> list[str]:
    """The modules that all names begin with."""
    ends = (name.split(".")[:-1] for name in (min(names, default=""), max(names, default="")))
    return [part for part, other in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))]


def _wrappers(parts: Sequence[str]) -> int:
    """How many of a name's first parts are those of wrappers."""
    count = 0
    for wrapper in _WRAPPERS:
        count += parts[count : count + 1] == [wrapper]
    return count
