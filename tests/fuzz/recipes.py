"""A network as data: what builds it, twice the same, and prints as the code that does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn


@dataclass(frozen=True, repr=False)
class Make:
    """A call that makes a part of a network; its arguments may be parts."""

    function: Callable[..., Any]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, instead: Mapping[Any, Callable[..., Any]]) -> Any:
        args = [_build(value, instead) for value in self.args]
        kwargs = {name: _build(value, instead) for name, value in self.kwargs.items()}
        return instead.get(self.function, self.function)(*args, **kwargs)

    def __repr__(self) -> str:
        name = self.function.__qualname__
        prefix = "nn." if getattr(nn, name, None) is self.function else ""
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{prefix}{name}({', '.join(given)})"


def make(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Make:
    return Make(function, args, kwargs)


def _build(value: Any, instead: Mapping[Any, Callable[..., Any]]) -> Any:
    if isinstance(value, list):
        return [_build(entry, instead) for entry in value]
    return value.build(instead) if isinstance(value, Make) else value


@dataclass(frozen=True)
class Recipe:
    """A whole network, and what is to be known of it.

    Attributes:
        network: What makes it.
        shape: Of its input.
        dtype: Of its parameters and input.
        kinds: The kinds of parts that it is made of.
        flags: What these say of it.
    """

    network: Make
    shape: tuple[int, ...]
    dtype: torch.dtype
    kinds: frozenset[str]
    flags: frozenset[str]

    def build(self, instead: Mapping[Any, Callable[..., Any]] | None = None) -> nn.Module:
        """Build it, every time with the same numbers, in evaluation mode.

        Args:
            instead: Functions to be called instead of others.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.network.build(instead or {}).to(self.dtype)
        for module in network.modules():
            module.training = False  # eval() is not for exported parts
        return network

    def image(self, seed: int = 0) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
