"""Glob patterns of qualified names."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from coconv_surgery.layers.arguments import instance, near_miss, sequence

Patterns = str | Iterable[str]


def as_list(patterns: Any, name: str) -> list[str]:
    """One pattern or several, as a list.

    Args:
        patterns: What was given.
        name: The argument that it was given for.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If it is neither.

    >>> as_list("layer1.*", "include")
    ['layer1.*']
    """
    if isinstance(patterns, str):
        return [patterns]
    several = tuple(patterns) if isinstance(patterns, Set) else patterns  # their order does not count
    form = "must be a pattern or a list of patterns"
    return [instance(each, f"a pattern in {name}", str, "a string") for each in sequence(several, name, form)]


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
                hint = near_miss(pattern, sorted(modules), count=3) or f"names look like {names[:1]}"
                raise ValueError(f"{argument}: no convolution matches {pattern!r}: {hint}")


def _matches(name: str, pattern: str) -> bool:
    # A name may hold what is special in a pattern, as "d.a[0]" does: it stands for itself all the same.
    if name == pattern or name.startswith(f"{pattern}."):
        return True
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
