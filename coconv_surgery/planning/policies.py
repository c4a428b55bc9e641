"""How many levels a convolution gets, at which dilations, with how many channels each."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from coconv_surgery.layers.arguments import (
    as_number,
    choice,
    kind,
    mapping,
    near_miss,
    shown,
    whole_number,
    whole_numbers,
)
from coconv_surgery.layers.functional import pair
from coconv_surgery.layers.levels import (
    Levels,
    SplitRule,
    complete_levels,
    level_dilations,
    level_units,
    scale_dilations,
    split_channels,
)
from coconv_surgery.planning.maps import check_maps
from coconv_surgery.tracing.trace import TracedConv

Shared = Literal["min", "max"]
Answer = Levels | int | Sequence[int]


class Policy(Protocol):
    """Decides on the levels of a convolution. Any function of this form is a policy.

    It answers with a number of levels n (dilations 1 to n), with a sequence of dilations (both in units of the
    convolution's own dilation), or with :class:`Levels`.
    """

    def __call__(self, conv: TracedConv, /) -> Answer:
        """Choose the levels of a convolution."""


@dataclass(frozen=True, kw_only=True)
class LevelPolicy:
    """Base of the policies that choose a number of levels n and use dilations 1 to n.

    Args:
        split: Split rule, see :func:`~coconv_surgery.layers.levels.split_channels`.
        min_channels: A convolution gets fewer levels rather than a level with fewer channels than this.
        shared: Which of the map sizes counts for a module that is called at several: the ``"min"`` or the ``"max"``.
    """

    split: SplitRule = "pow2"
    min_channels: int = 1
    shared: Shared = "min"

    def __post_init__(self) -> None:
        choice(self.split, "split", get_args(SplitRule))
        choice(self.shared, "shared", get_args(Shared))
        self._set("min_channels", whole_number(self.min_channels, "min_channels", at_least=1))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def levels(self, conv: TracedConv) -> int:
        """Number of levels, before the channels of the convolution are looked at."""
        raise NotImplementedError

    def resolution(self, conv: TracedConv) -> int:
        """Smallest side of the convolution's output map, at the call that counts."""
        choose = min if self.shared == "min" else max
        return choose(min(call.output_size) for call in conv.calls)

    def __call__(self, conv: TracedConv) -> Levels:
        """Choose the levels of a convolution."""
        units, _ = level_units(conv.conv)
        most = max(units, *(max(call.input_size) for call in conv.calls))
        for count in range(min(self.levels(conv), most), 1, -1):
            levels = self.build(conv, count)
            if levels is not None and _suits_its_maps(conv, levels):
                return levels
        return complete_levels(conv.conv, 1)

    def build(self, conv: TracedConv, count: int) -> Levels | None:
        """Levels of a convolution, given their number; None if there are too few channels for so many."""
        units, size = level_units(conv.conv)
        if count > units or min(split_channels(units, count, self.split)) * size < self.min_channels:
            return None
        return complete_levels(conv.conv, count, splits=self.split)


@dataclass(frozen=True)
class ResolutionPolicy(LevelPolicy):
    """Levels by the size of the output map: ``clamp(floor(log2(r)) - 1, 1, max_levels)`` for smallest side r.

    With the default of four levels at most, this is every row of Table 1 (56 → 4, 28 → 3, 14 → 2, 7 → 1) and of
    Table 2 (4 → 1, 8 → 2, 16 → 3, 32 and up → 4).
    """

    max_levels: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("max_levels", whole_number(self.max_levels, "max_levels", at_least=1))

    def levels(self, conv: TracedConv) -> int:
        """Number of levels for the map that counts."""
        return max(1, min(self.resolution(conv).bit_length() - 2, self.max_levels))


@dataclass(frozen=True)
class StagePolicy(LevelPolicy):
    """Levels by stage, a stage being the convolutions at one reduction of the network's input.

    Args:
        stages: Levels at reductions 4 (and less), 8, 16 and 32 (and more). Default: Table 1's. Other configurations of
            Table 3 are ``(2, 2, 2, 1)``, ``(3, 3, 2, 1)`` and ``(3, 3, 3, 3)``.
    """

    stages: tuple[int, ...] = (4, 3, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        form = "must be four numbers of at least 1, for reductions 4, 8, 16 and 32"
        self._set("stages", whole_numbers(self.stages, "stages", form, lengths=[4]))

    def levels(self, conv: TracedConv) -> int:
        """Number of levels of the convolution's stage."""
        if conv.network_size is None:
            raise ValueError(f"{type(self).__name__} needs an image among the inputs to know the reduction")
        reduction = min(conv.network_size) / self.resolution(conv)
        stage = round(math.log2(reduction)) - 2
        return self.stages[max(0, min(stage, 3))]


@dataclass(frozen=True)
class TopPolicy(StagePolicy):
    """Only the highest dilation of each stage: ``top(4, 3, 2, 1)`` of Table 3, the paper's counter-example."""

    def build(self, conv: TracedConv, count: int) -> Levels | None:
        """The one level of a convolution."""
        return complete_levels(conv.conv, dilations=scale_dilations(conv.conv.dilation, [count]))


@dataclass(frozen=True)
class UniformPolicy(LevelPolicy):
    """The same number of levels everywhere.

    Args:
        count: Number of levels.
    """

    count: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("count", whole_number(self.count, "count", at_least=1))

    def levels(self, conv: TracedConv) -> int:
        """The number of levels."""
        return self.count


POLICIES: dict[str, Callable[..., Policy]] = {
    "resolution": ResolutionPolicy,
    "stage": StagePolicy,
    "top": TopPolicy,
    "uniform": UniformPolicy,
}

_NAME = re.compile(r"(\w+)(?:\((\d+(?:, ?\d+)*)\))?")


def get_policy(policy: str | Policy, **settings: Any) -> Policy:
    """Look a policy up by its name; a policy passes through.

    A name may be followed by the policy's numbers: ``"stage(3,3,2,1)"`` and ``"top(4,3,2,1)"`` as in Table 3, and
    likewise ``"resolution(5)"`` and ``"uniform(3)"``.

    Args:
        policy: The policy or its name.
        **settings: Further arguments of a policy that is named.

    Raises:
        ValueError: If there is no policy of that name, or if the numbers or settings do not suit it.
        TypeError: If it is neither a name nor callable, or if settings are given for one that is not named.

    >>> get_policy("stage(3,3,2,1)").stages
    (3, 3, 2, 1)
    """
    if isinstance(policy, str):
        return named_policy(policy, **settings)
    if isinstance(policy, type):
        raise TypeError(f"policy must be an object, as {policy.__name__}(), not the class")
    if not callable(policy):
        raise TypeError(f"policy must be a name or a callable, not {kind(policy)}")
    if settings:
        raise TypeError(f"{', '.join(settings)}: settings go with the name of a policy; this one has its own")
    return policy


def named_policy(policy: str, **settings: Any) -> Policy:
    """Make a policy by its name.

    Args:
        policy: As of :func:`get_policy`.
        **settings: Further arguments of the policy.

    Raises:
        ValueError: If there is no policy of that name, or numbers or settings do not suit it.

    >>> named_policy("uniform(3)", min_channels=16)
    UniformPolicy(split='pow2', min_channels=16, shared='min', count=3)
    """
    match = _NAME.fullmatch(policy)
    name, numbers = match.groups() if match else (policy, None)
    if match is None or name not in POLICIES:
        hint = near_miss(name, POLICIES)
        raise ValueError(
            f"unknown policy {shown(policy)}: {hint and f'{hint} '}There are {', '.join(map(repr, POLICIES))}; numbers "
            "may follow, as in 'stage(4,3,2,1)' or 'uniform(2)'"
        )
    values: tuple[Any, ...] = tuple(map(int, numbers.split(","))) if numbers else ()
    if values and name in ("stage", "top"):
        values = (values,)
    if len(values) > 1:
        raise ValueError(f"policy {policy!r}: {name} takes one number")
    mapping(settings, f"policy {policy!r}", "settings", keys=inspect.signature(POLICIES[name]).parameters)
    try:
        return POLICIES[name](*values, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {policy!r}: {error}") from error


def settle(conv: TracedConv, answer: Answer) -> Levels:
    """Turn a policy's answer into dilations and splits that are sure to suit a convolution and its maps.

    Raises:
        ValueError: If they do not.
    """
    if isinstance(answer, Levels):
        levels = complete_levels(conv.conv, dilations=level_dilations(answer.dilations), splits=answer.splits)
    elif (count := as_number(answer)) is not None:
        levels = complete_levels(conv.conv, count)
    elif isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
        raise ValueError("give a number of levels, a sequence of dilations, or Levels(dilations, splits)")
    else:
        own = pair(conv.conv.dilation)
        factors = [pair(dilation) for dilation in level_dilations(answer)]
        levels = complete_levels(conv.conv, dilations=[(h * own[0], w * own[1]) for h, w in factors])
    check_maps(conv.site.signature, levels, [call.input_size for call in conv.calls])
    return levels


def _suits_its_maps(conv: TracedConv, levels: Levels) -> bool:
    try:
        check_maps(conv.site.signature, levels, [call.input_size for call in conv.calls])
    except ValueError:
        return False
    return True
