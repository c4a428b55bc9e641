"""Glob patterns of qualified names."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

Patterns = str | Iterable[str]


def as_list(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches a name, where the name of a module stands for all within.

    >>> first_match("layer1.0.conv2", ["layer2.*", "layer1", "*.conv2"])
    'layer1'
    """
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*")), None)


def check_patterns(patterns: Mapping[str, Iterable[str]], names: Sequence[str]) -> None:
    """Check that every pattern matches some name.

    Args:
        patterns: Patterns by the argument that gives them.
        names: Names of convolutions.

    Raises:
        ValueError: If one matches none, with near misses.
    """
    modules = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    for argument, group in patterns.items():
        for pattern in group:
            if all(first_match(name, [pattern]) is None for name in names):
                near = difflib.get_close_matches(pattern, sorted(modules), n=3)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names look like {names[:1]}"
                raise ValueError(f"{argument}: no convolution matches {pattern!r}: {hint}")
