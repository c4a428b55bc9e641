"""What is to become of each convolution that a trace found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn as nn

from coconv_surgery.layers.arguments import mapping, near_miss, shown
from coconv_surgery.layers.levels import Levels, is_plain
from coconv_surgery.planning.eligibility import obstacle, reason_to_leave
from coconv_surgery.planning.notes import noted_plan
from coconv_surgery.planning.patterns import Patterns, as_list, check_patterns, first_match
from coconv_surgery.planning.plan import Plan, PlanRow, count_parameters
from coconv_surgery.planning.policies import Answer, Policy, get_policy, settle
from coconv_surgery.planning.reasons import Reason, Why
from coconv_surgery.tracing.finding import find_intact_sites
from coconv_surgery.tracing.sites import Site, calibrated_images
from coconv_surgery.tracing.trace import TracedConv

# Of a conversion, which takes the settings of a policy as well.
_ARGUMENTS = ("policy", "input_size", "example_inputs", "include", "exclude", "overrides", "inplace", "calibrate")


@dataclass(frozen=True)
class Choices:
    """What a user asks for, checked against the names that there are; see :func:`~coconv_surgery.plan_conversion`.

    Attributes:
        policy: A policy, or the name of one.
        include: Glob patterns of convolutions to consider. Default: all.
        exclude: Patterns of convolutions that stay what they are.
        overrides: Levels by pattern.
        settings: Arguments of a policy that is named.
    """

    policy: str | Policy = "resolution"
    include: Patterns | None = None
    exclude: Patterns | None = None
    overrides: Mapping[str, Answer | None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    _decide: Policy = field(init=False)
    _include: list[str] | None = field(init=False)
    _exclude: list[str] = field(init=False)
    _overrides: dict[str, Answer | None] = field(init=False)

    def __post_init__(self) -> None:
        for name in self.settings:
            if hint := near_miss(name, _ARGUMENTS):
                raise TypeError(f"there is no argument {name!r}: {hint}")
        # Read once: patterns may be an iterator, and so may the levels of an override.
        object.__setattr__(self, "_decide", get_policy(self.policy, **self.settings))
        object.__setattr__(self, "_include", None if self.include is None else as_list(self.include, "include"))
        object.__setattr__(self, "_exclude", as_list(() if self.exclude is None else self.exclude, "exclude"))
        overrides = {} if self.overrides is None else mapping(self.overrides, "overrides", "levels by pattern")
        kept = {key: tuple(value) if isinstance(value, Iterator) else value for key, value in overrides.items()}
        object.__setattr__(self, "_overrides", kept)

    @property
    def label(self) -> str:
        """The policy, for a reader."""
        return self.policy if isinstance(self.policy, str) and not self.settings else repr(self._decide)

    def check(self, sites: Sequence[Site]) -> None:
        """Check that every pattern matches a site.

        Raises:
            ValueError: If one does not.
        """
        names = [name for site in sites for name in (site.name, *site.aliases)]
        given = {"include": self._include or [], "exclude": self._exclude, "overrides": list(self._overrides)}
        check_patterns(given, names)

    def row(self, conv: TracedConv) -> PlanRow:
        """Decide on a convolution.

        Raises:
            ValueError: If a policy or an override gives it levels that it cannot take.
        """
        names = (conv.name, *conv.aliases)
        override = first_match(names, self._overrides)
        if override is None:
            why = self._left_out(names) or obstacle(conv) or reason_to_leave(conv)
            return _untouched(conv, why) if why else _settled(conv, self._decide(conv), f"policy {self.label}")
        answer, source = self._overrides[override], f"overrides[{override!r}]"
        if answer is None:
            return _untouched(conv, Reason.EXCLUDED.because())
        if why := obstacle(conv):
            if override in names:
                raise ValueError(f"{source} names a conv that cannot be split: {why.text}")
            return _untouched(conv, why)
        if override not in names and (why := reason_to_leave(conv)):
            return _untouched(conv, why)
        return _settled(conv, answer, source)

    def _left_out(self, names: Sequence[str]) -> Why | None:
        if self._include is not None and first_match(names, self._include) is None:
            return Reason.NOT_INCLUDED.because()
        return Reason.EXCLUDED.because() if first_match(names, self._exclude) is not None else None


def found_row(site: Site) -> PlanRow:
    """A row that says what a site is, without a trace."""
    why = None
    if site.no_plain_form and site.state == site.plain:
        why = Reason.FIXED_LEVELS.because(why=site.no_plain_form)
    elif site.levels is None:
        why = Reason.PLAIN.because()
    return _row(TracedConv(site), site.state, why)


def current_plan(model: nn.Module) -> Plan:
    """What a network is: the plan that is kept with it as long as that describes it, else one read off its modules.

    Raises:
        ValueError: If a contextual convolution was pruned: its levels do not suit it.
    """
    sites = find_intact_sites(model)
    found = Plan(
        tuple(map(found_row, sites)),
        policy="as found",
        input="unknown",
        parameters=count_parameters(model),
        calibrated=calibrated_images(sites),
        stale=any(site.stale for site in sites),
    )
    remembered = noted_plan(model)
    if remembered is None or remembered.diff(found):
        return found
    # A new classifier may have come since.
    return replace(remembered, parameters=found.parameters, calibrated=found.calibrated, stale=found.stale)


def _untouched(conv: TracedConv, why: Why) -> PlanRow:
    return _row(conv, conv.site.state, None if conv.site.levels is not None else why)


def _settled(conv: TracedConv, answer: Answer, source: str) -> PlanRow:
    try:
        levels = settle(conv, answer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} gave {conv.name} the levels {shown(answer)}: {error}") from error
    return _row(conv, levels, Reason.ONE_LEVEL.because() if is_plain(conv.conv, levels.dilations) else None)


def _row(conv: TracedConv, levels: Levels, why: Why | None) -> PlanRow:
    assert not isinstance(levels.splits, str)
    return PlanRow(
        conv.name,
        conv.site.signature,
        levels.dilations,
        levels.splits,
        why.text if why else None,
        calls=len(conv.calls),
        output_sizes=tuple(dict.fromkeys(call.output_size for call in conv.calls)),
        aliases=conv.aliases,
        untraced=conv.untraced,
        reason_key=why.reason if why else None,
    )
