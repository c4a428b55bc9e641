"""The rows of a sweep as a page for readers."""

import json
import platform
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from coconv_surgery.sweep.check import CONVERTED, CRASHED, FAILED, NOT_BUILT, Row
from coconv_surgery.sweep.collections import COLLECTIONS, Collection
from coconv_surgery.sweep.walk import read_rows
from coconv_surgery.viz.tables import markdown_table

# Seconds from one writing of the pages to the next, while a sweep goes on.
_EVERY = 30


class Pages:
    """The pages of a folder of sweeps, kept up while one goes on.

    Args:
        name: The collection that is swept.
        folder: Where its rows are, and its page will be, beside ``index.md``.
        command: The command that makes them.
    """

    def __init__(self, name: str, folder: Path, command: str) -> None:
        self.path = folder / f"{name}.md"
        self._name, self._folder, self._command = name, folder, command
        self._written = time.monotonic()

    def renew(self) -> None:
        """Write them, if they were not for a while."""
        if time.monotonic() - self._written > _EVERY:
            self.write()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write them at the end, however that comes."""
        try:
            yield
        finally:
            self.write()

    def write(self) -> None:
        """Write them, of the rows that there are."""
        tables = {name: read_rows(self._folder / f"{name}.csv") for name in COLLECTIONS}
        if rows := tables[self._name]:
            rows.sort(key=lambda row: (row.family, row.name))
            self.path.write_text(render(COLLECTIONS[self._name], rows, self._command), encoding="utf-8")
            index = render_index({name: found for name, found in tables.items() if found})
            (self._folder / "index.md").write_text(index, encoding="utf-8")
        self._written = time.monotonic()


def render(collection: Collection, rows: Sequence[Row], command: str) -> str:
    """Write the page of a collection: totals, families, and every network.

    Args:
        collection: The collection.
        rows: Its rows.
        command: The command that made them.
    """
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    parts = [
        f"# What conversion does to {collection.title}",
        f"Made by `{command}` with {collection.package} {version(collection.package)}, torch {torch.__version__}, "
        f"Python {platform.python_version()} on {platform.machine()}; one thread a process.",
        _totals(rows),
        "## Families",
        _LEGEND,
        markdown_table(
            ("family", "networks", *_COUNTS, "left alone because"),
            [
                (f"[{name}](#{_anchor(name)})", str(len(members)), *_counts(members), _reasons(members))
                for name, members in sorted(families.items())
            ],
        ),
    ]
    not_built = [row for row in rows if row.status == NOT_BUILT]
    if not_built:
        parts += [
            "## Not built here",
            f"What {collection.title} itself cannot build in this environment, in its own words.",
            markdown_table(("network", "error"), [(f"`{row.name}`", _cell(row.error)) for row in not_built]),
        ]
    for name, members in sorted(families.items()):
        parts += [
            f"## {name}",
            markdown_table(_HEADER, map(_line, members)),
        ]
    return "\n\n".join(parts) + "\n"


def render_index(tables: Mapping[str, Sequence[Row]]) -> str:
    """Write the table of all collections.

    Args:
        tables: The rows of each by its name, which is also that of its page.
    """
    header = ("collection", "networks", "converted", "not built", "failed or changed", "3×3", "contextual", "median s")
    lines = []
    for name, rows in sorted(tables.items()):
        statuses = Counter(row.status for row in rows)
        unsound = sum(not row.sound for row in rows if row.status != NOT_BUILT)
        counts = (len(rows), statuses[CONVERTED], statuses[NOT_BUILT], unsound)
        convs = (sum(row.convs_3x3 for row in rows), sum(row.converted for row in rows))
        seconds = statistics.median([row.seconds for row in rows if row.status == CONVERTED] or [0.0])
        cells = (f"{count:,}" for count in (*counts, *convs))
        lines.append((f"[{name}]({name}.md)", *cells, f"{seconds:.2f}"))
    return f"# Coverage\n\n{_INDEX}\n\n{markdown_table(header, lines)}\n"


_INDEX = (
    "What conversion does to whole collections of networks. *not built*: what the collection itself cannot build in "
    "this environment. *failed or changed*: an exception, or parameters, state-dict keys or output shapes that are "
    "not what they were. *3×3* and *contextual* count 3×3 convolutions of every kind, and convolutions converted. "
    "`coconv sweep` makes a page and this table."
)
_COUNTS = ("3×3", "converted", "one level", "left alone")
_HEADER = ("network", *_COUNTS, "million parameters", "outputs", "s")
_LEGEND = (
    "*3×3* counts 3×3 convolutions of every kind, *converted* the convolutions that become contextual, *one level* the "
    "3×3 convolutions whose map is too small for a second level, *left alone* the other ones. Parameters, state-dict "
    "keys and the shapes of outputs are the same before and after in every network that is not marked."
)


def _totals(rows: Sequence[Row]) -> str:
    statuses = Counter(row.status for row in rows)
    converted = [row for row in rows if row.status == CONVERTED]
    ran = [row for row in converted if row.outputs_before]
    seconds = [row.seconds for row in converted] or [0.0]
    convs = sum(row.convs_3x3 for row in converted)
    reasons = _left_alone(converted)
    lines = [
        f"{len(rows)} networks",
        f"{statuses[CONVERTED]} planned, converted and reverted without an exception",
        f"{statuses[NOT_BUILT]} not built",
        f"{statuses[FAILED]} failed, {statuses[CRASHED]} crashed",
        f"{sum(row.same_state for row in converted)} with the same parameters and state-dict keys after conversion",
        f"{sum(row.outputs_before == row.outputs_after for row in ran)} of {len(ran)} whose forward runs here with "
        "outputs of the same shape",
        f"{sum(row.reverted for row in converted)} reverted to what they were",
        f"{sum(row.converted for row in converted):,} convolutions converted; of {convs:,} 3×3 convolutions, "
        f"{sum(row.one_level for row in converted):,} have room for one level only and {sum(reasons.values()):,} are "
        "left alone",
        f"{statistics.median(seconds or [0]):.2f} s to plan, convert and revert the median network, "
        f"{max(seconds, default=0):.1f} s the slowest",
    ]
    bullets = "\n".join(f"- {line}" for line in lines)
    why = markdown_table(
        ("3×3 convolutions", "left alone because"), [(f"{n:,}", _cell(why)) for why, n in reasons.most_common()]
    )
    return f"{bullets}\n\n{why}" if reasons else bullets


def _line(row: Row) -> tuple[str, ...]:
    if row.status != CONVERTED:
        return (f"`{row.name}`", *[""] * len(_COUNTS), "", f"**{row.status}** {_cell(row.error)}"[:200], "")
    outputs = "same" if row.outputs_before == row.outputs_after else "**differ**"
    if not row.outputs_before:
        outputs = "need numbers"
    flaws = "" if row.sound else " **not sound**"
    return (
        f"`{row.name}`",
        *_counts([row]),
        f"{row.parameters_after / 1e6:.2f}",
        outputs + flaws,
        f"{row.seconds:.2f}",
    )


def _counts(rows: Sequence[Row]) -> tuple[str, ...]:
    left_alone = sum(_left_alone(rows).values())
    sums = [sum(getattr(row, name) for row in rows) for name in ("convs_3x3", "converted", "one_level")]
    return tuple(f"{count:,}" for count in (*sums, left_alone))


def _left_alone(rows: Iterable[Row]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for row in rows:
        counted.update(json.loads(row.left_alone))
    return counted


def _reasons(rows: Iterable[Row]) -> str:
    return _cell("; ".join(f"{count} {reason}" for reason, count in _left_alone(rows).most_common()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
