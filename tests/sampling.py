"""A few of many cases, which stand for all of them where time is short."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], count: int) -> list[Any]:
    """All cases, of which so many, evenly spread, are always run, and the others by ``make test-long``."""
    cases = list(cases)
    always = {index * len(cases) // count for index in range(count)}
    return [case if index in always else pytest.param(case, marks=pytest.mark.long) for index, case in enumerate(cases)]
