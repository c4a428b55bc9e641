"""Calls of merging methods, one within another."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch.nn as nn


@dataclass
class Call:
    """One call of a merging method.

    Attributes:
        within: The calls within it.
        merged: Convolutions that it has merged away itself.
        made: Convolutions that it has made itself.
    """

    within: "list[Call]" = field(default_factory=list)
    merged: list[nn.Conv2d] = field(default_factory=list)
    made: list[nn.Conv2d] = field(default_factory=list)

    def all_merged(self) -> list[nn.Conv2d]:
        """What it and the calls within it have merged away."""
        return [*self.merged, *(conv for call in self.within for conv in call.all_merged())]

    def all_made(self) -> list[nn.Conv2d]:
        """What it and the calls within it have made."""
        return [*self.made, *(conv for call in self.within for conv in call.all_made())]


_calls: ContextVar[tuple[Call, ...]] = ContextVar("_calls", default=())


def is_merging() -> bool:
    """Whether a call sees to the levels."""
    return bool(_calls.get())


@contextmanager
def entered(call: Call) -> Iterator[None]:
    """Make a call the one that is going on."""
    token = _calls.set((*_calls.get(), call))
    try:
        yield
    finally:
        _calls.reset(token)


def enclosing() -> Call | None:
    """The call that is going on."""
    return next(reversed(_calls.get()), None)
