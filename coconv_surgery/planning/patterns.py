"""Glob patterns of qualified names."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

Patterns = str | Iterable[str]


def as_list(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def first_match(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first pattern that matches one of a module's names, where the name of a module stands for all within.

    A pattern that is one of the names counts before any other.

    >>> first_match(["layer1.0.conv2"], ["layer2.*", "layer1", "*.conv2"])
    'layer1'
    >>> first_match(["layer1.0.conv2"], ["layer1", "layer1.0.conv2"])
    'layer1.0.conv2'
    """
    names, patterns = list(names), list(patterns)
    exact = next((pattern for pattern in patterns if pattern in names), None)
    if exact is not None:
        return exact
    return next((pattern for pattern in patterns if any(_matches(name, pattern) for name in names)), None)


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
            if first_match(names, [pattern]) is None:
                near = difflib.get_close_matches(pattern, sorted(modules), n=3)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names look like {names[:1]}"
                raise ValueError(f"{argument}: no convolution matches {pattern!r}: {hint}")


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
