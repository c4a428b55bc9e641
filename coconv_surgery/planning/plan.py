"""The plan of a conversion: its preview, its report, and the file to replay."""

import functools
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn

from coconv_surgery.layers.arguments import (
    Pair,
    as_number,
    file_to_read,
    flag,
    height_and_width,
    instance,
    mapping,
    optional_text,
    sequence,
    shown,
    text,
    whole_number,
    whole_numbers,
)
from coconv_surgery.layers.files import whole_file
from coconv_surgery.layers.functional import Dilation, pair
from coconv_surgery.layers.levels import squeeze
from coconv_surgery.planning.reasons import Reason
from coconv_surgery.tracing.signature import Signature

FORMAT = "coconv-plan"
VERSION = 1


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the network."""


def count_parameters(model: nn.Module) -> int:
    """The number of parameters of a network, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class PlanRow:
    """What is to become of one convolution.

    Attributes:
        name: Its qualified name.
        signature: The plain convolution.
        dilations: Dilation of each level; the convolution's own if it is left alone.
        splits: Output channels of each level.
        reason: Why it is left alone, or None if it becomes a CoConv, or its one level is the convolution itself.
        calls: How often it runs in one forward pass.
        output_sizes: The different heights and widths of its output map.
        aliases: Other names of the same module.
        untraced: Why torch.fx has no node for it, where that is so.
        reason_key: The reason for code to ask for; None where it becomes a CoConv, or a hand wrote the reason.
    """

    name: str
    signature: Signature
    dilations: tuple[Dilation, ...]
    splits: tuple[int, ...]
    reason: str | None = None
    calls: int = 0
    output_sizes: tuple[Pair, ...] = ()
    aliases: tuple[str, ...] = ()
    untraced: str | None = None
    reason_key: Reason | None = None

    def __post_init__(self) -> None:
        row = f"row {shown(text(self.name, 'name'))}:"
        instance(self.signature, f"{row} signature", Signature, "a Signature")
        instance(self.reason_key, f"{row} reason_key", (Reason, type(None)), "a Reason or None")
        checked = {name: check(getattr(self, name), f"{row} {name}") for name, check in _CHECKS.items()}
        if len(checked["dilations"]) != len(checked["splits"]):
            raise ValueError(f"{row} dilations and splits must have one entry for each level")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.dilations)

    @property
    def converted(self) -> bool:
        """Whether the convolution becomes a CoConv."""
        return self.why_left_alone is None

    @property
    def why_left_alone(self) -> str | None:
        """The reason, also where a single level at the convolution's own dilation is the convolution itself."""
        itself = [*map(pair, self.dilations)] == [self.signature.dilation]
        return Reason.ONE_LEVEL.value if self.reason is None and itself else self.reason


@dataclass(frozen=True)
class Plan:
    """The plan of a conversion; it prints as a table.

    Attributes:
        rows: One for every convolution of the network.
        policy: The policy that decided, as text.
        input: The input that the map sizes belong to, as text.
        parameters: Parameters of the network, the same before and after.
        traced: How the convolutions and their map sizes were found, as text.
        calibrated: On how many images the weights were calibrated after the conversion, see
            :func:`~coconv_surgery.calibrate`; 0 if they were not. It is of weights, and does not replay.
        stale: Whether levels have changed since, so that they are not those that the weights were calibrated for.
    """

    rows: tuple[PlanRow, ...]
    policy: str
    input: str
    parameters: int
    traced: str = "not traced"
    calibrated: int = 0
    stale: bool = False

    def __post_init__(self) -> None:
        for row in instance(self.rows, "rows", tuple, "a tuple of PlanRow"):
            _as_row(row)
        for name in ("policy", "input", "traced"):
            text(getattr(self, name), name)
        for name in ("parameters", "calibrated"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, at_least=0))
        flag(self.stale, "stale")

    @property
    def converted(self) -> tuple[PlanRow, ...]:
        """The rows that become a CoConv."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def left_alone(self) -> tuple[PlanRow, ...]:
        """The rows that stay plain convolutions."""
        return tuple(row for row in self.rows if not row.converted)

    @property
    def in_question(self) -> tuple[PlanRow, ...]:
        """The rows that a reader looks for: 3×3 convolutions, and whatever else becomes a CoConv."""
        return tuple(row for row in self.rows if row.converted or row.signature.kernel_size == (3, 3))

    def reasons(self, rows: Iterable[PlanRow] | None = None) -> dict[str, int]:
        """How many convolutions are left alone for each reason, the most frequent first.

        Args:
            rows: Count among these. Default: all.
        """
        among = self.rows if rows is None else sequence(rows, "rows", "must be rows of a plan")
        counted = Counter(row.why_left_alone for row in map(_as_row, among) if row.why_left_alone)
        return dict(counted.most_common())

    def summary(self) -> str:
        """Sum the plan up in one line."""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.reasons().items())
        since = " before levels changed" if self.stale else ""
        return (
            f"{len(self.rows)} convs: {len(self.converted)} converted, {len(self.left_alone)} left alone"
            f"{f' ({reasons})' if reasons else ''}; {self.parameters:,} parameters before = after"
            f"{f'; calibrated on {self.calibrated:,} images{since}' if self.calibrated else ''}"
        )

    def table(self, *, every_conv: bool = False, width: int | None = None) -> str:
        """Lay the plan out as an aligned table.

        Args:
            every_conv: Show 1×1 convolutions and the like as well, which the summary just counts.
            width: Characters in a line; where the table takes more, each row becomes a paragraph. Default: any number.
        """
        shown = self.rows if flag(every_conv, "every_conv") else self.in_question
        header = ("conv", "channels", "map", "levels", "dilations", "splits", "left alone because")
        return align([header, *map(_cells, shown)], width)

    def __str__(self) -> str:
        return f"{self.table()}\npolicy: {self.policy}\ninput: {self.input}\ntraced: {self.traced}\n{self.summary()}"

    def diff(self, other: "Plan") -> list[str]:
        """Say in words where another plan decides differently; map sizes and reasons do not count."""
        instance(other, "other", Plan, "a Plan")
        mine, others = ({row.name: row for row in plan.rows} for plan in (self, other))
        differences = [f"{name}: missing" for name in mine if name not in others]
        differences += [f"{name}: unexpected" for name in others if name not in mine]
        for name in mine.keys() & others.keys():
            row, changed = mine[name], others[name]
            if row.signature != changed.signature:
                differences.append(f"{name}: {changed.signature.differences(row.signature)}")
            elif (row.dilations, row.splits) != (changed.dilations, changed.splits):
                differences.append(f"{name}: {_levels(row)} became {_levels(changed)}")
        return sorted(differences)

    def to_json(self, path: str | Path | None = None) -> str:
        """Write the plan as JSON.

        Args:
            path: A file to write as well.

        Raises:
            TypeError: If it is not a path.
            OSError: If it cannot be written; one that was there before stays.
        """
        if path is not None:
            with whole_file(path, "path") as passing:
                passing.write_text(self._json + "\n", encoding="utf-8")
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for name in ("calibrated", "stale"):
            if not content[name]:
                del content[name]  # as in plans of earlier releases, from which guards have their names
        return json.dumps(content, indent=1, ensure_ascii=False, default=_reason_name)

    @classmethod
    def from_json(cls, source: str | Path) -> "Plan":
        """Read a plan.

        Args:
            source: JSON text, or the path of a file of it.

        Raises:
            TypeError: If it is neither.
            PlanError: If it is not a plan, or has another format version.
            OSError: If the file cannot be read.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        if is_text:
            return read_plan_text(str(source), "the text")
        return read_plan_text(file_to_read(source, "source", "JSON text or the path of a file").read_bytes(), source)


def read_plan_text(content: str | bytes, source: str | Path) -> Plan:
    """Read a plan.

    Args:
        content: JSON.
        source: Where it comes from, for the message.

    Raises:
        PlanError: If it is not a plan, or has another format version.
    """
    try:
        data = json.loads(content)
    except (RecursionError, ValueError) as error:
        raise PlanError(f"{source} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise PlanError(f'{source} is not a plan: a plan has \'"format": "{FORMAT}"\'')
    if (version := as_number(data.pop("version", None))) != VERSION:
        later = version is not None and version > VERSION
        which = f"plan version {shown(version)}, of a later release" if later else "no plan version that there is"
        raise PlanError(f"{source} has {which}; this release reads version {VERSION}{'; update it' if later else ''}")
    try:
        rows = sequence(data.get("rows"), "rows", "must be a list")
        return Plan(**{**data, "rows": tuple(map(_read_row, rows))})
    except (TypeError, ValueError) as error:
        raise PlanError(f"{source} is not a complete plan: {error}") from error


def align(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Lay rows of text out in columns, a rule under the first.

    Args:
        rows: Cells of each row, those of the header first.
        width: Characters in a line. Where columns take more, each row becomes a paragraph. Default: any number.

    >>> print(align([("conv", "levels"), ("layer1.conv1", "4")], width=18))
    layer1.conv1
      levels  4
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None and sum(widths) + 2 * len(widths) - 2 > width:
        return "\n".join(_paragraph(rows[0], row, width) for row in rows[1:])
    rule = ["─" * width for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [rows[0], rule, *rows[1:]]
    )


def _paragraph(header: Sequence[str], row: Sequence[str], width: int) -> str:
    """A row, its first cell above the others, which are told by name."""
    indent = max(map(len, header[1:]), default=0) + 4
    lines = textwrap.wrap(row[0], width) or [""]
    for name, cell in zip(header[1:], row[1:], strict=True):
        label = f"  {name}".ljust(indent)
        lines += textwrap.wrap(cell, max(width, indent + 8), initial_indent=label, subsequent_indent=" " * indent)
    return "\n".join(lines)


def _as_row(row: Any) -> PlanRow:
    return instance(row, "an entry of rows", PlanRow, "a PlanRow")


def _cells(row: PlanRow) -> tuple[str, ...]:
    signature = row.signature
    name = " = ".join((row.name, *row.aliases))
    groups = f" /{signature.groups}" if signature.groups > 1 else ""
    channels = f"{signature.in_channels} → {signature.out_channels}{groups}"
    sizes = ", ".join(f"{height}×{width}" for height, width in row.output_sizes) or "–"
    levels = (str(row.levels), _join(row.dilations), _join(row.splits))
    return (name, channels, sizes, *levels, row.why_left_alone or "")


def _levels(row: PlanRow) -> str:
    return f"dilations {_join(row.dilations)} with {_join(row.splits)} channels"


def _join(values: Iterable[Dilation]) -> str:
    return ", ".join(str(value) if isinstance(value, int) else "×".join(map(str, value)) for value in values)


def _reason_name(reason: Reason) -> str:
    return reason.name.lower()


def _read_row(data: Any) -> PlanRow:
    given = mapping(data, "an entry of rows", "its fields")
    row = f"row {shown(given.get('name'))}"
    given["signature"] = Signature(**mapping(given.get("signature"), f"{row}: signature", "its fields"))
    if (key := given.get("reason_key")) is not None:
        if key not in map(_reason_name, Reason):
            raise ValueError(f"{row} has a reason_key that does not exist: {shown(key)}")
        # Whoever takes the reason out by hand means that the convolution is to be converted.
        given["reason_key"] = None if given.get("reason") is None else Reason[key.upper()]
    return PlanRow(**given)


def _dilations(values: Any, name: str) -> tuple[Dilation, ...]:
    each = sequence(values, name, "must be a dilation for each level")
    return tuple(squeeze(height_and_width(value, name, at_least=1)) for value in each)


def _splits(values: Any, name: str) -> tuple[int, ...]:
    return whole_numbers(values, name, "must be channels for each level", at_least=0)


def _reason(value: Any, name: str) -> str | None:
    reason = optional_text(value, name)
    if reason is not None and not reason.strip():
        raise ValueError(f"{name}={shown(reason)} must say why, or be None for a convolution to convert")
    return reason


def _sizes(values: Any, name: str) -> tuple[Pair, ...]:
    each = sequence(values, name, "must be pairs of height and width")
    return tuple(height_and_width(sequence(value, name, "must be (height, width)"), name, at_least=0) for value in each)


def _names(values: Any, name: str) -> tuple[str, ...]:
    return tuple(text(value, name) for value in sequence(values, name, "must be names"))


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "dilations": _dilations,
    "splits": _splits,
    "reason": _reason,
    "calls": functools.partial(whole_number, at_least=0),
    "output_sizes": _sizes,
    "aliases": _names,
    "untraced": optional_text,
}
