"""What makes a convolution the one that a plan means."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch.nn as nn

from coconv_surgery.layers.arguments import Pair, choice, height_and_width, text, whole_number
from coconv_surgery.layers.functional import NAMED_PADDING

_PLAIN: dict[str, Any] = {
    "in_channels": 0,
    "out_channels": 0,
    "kernel_size": (1, 1),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


@dataclass(frozen=True)
class Signature:
    """What makes a convolution the one that a plan means; fields as in :class:`torch.nn.Conv2d`.

    Numbers are kept as Python's own integers. No channels, or a kernel of no size, are those that are not known.

    Raises:
        TypeError: If ``padding_mode`` is not a string.
        ValueError: If a field is not what a convolution could have.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int
    padding_mode: str

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name), name))

    @classmethod
    def of(cls, conv: nn.Module) -> "Signature":
        """Read the signature off a module; what other kinds of convolution lack is as in a plain one."""
        return cls(**{field.name: _read(conv, field.name) for field in fields(cls)})

    def differences(self, planned: "Signature") -> str:
        """Say in words where a plan means another convolution."""
        pairs = ((field.name, getattr(self, field.name), getattr(planned, field.name)) for field in fields(self))
        return ", ".join(f"{name}={found}, planned {wanted}" for name, found, wanted in pairs if found != wanted)


def _read(conv: nn.Module, name: str) -> Any:
    try:
        return _CHECKS[name](getattr(conv, name, None), name)
    except (TypeError, ValueError):
        return _PLAIN[name]


def _padding(value: Any, name: str) -> Pair | str:
    if not isinstance(value, str):
        return height_and_width(value, name)  # torch takes a negative padding for a cut
    choice(value, name, NAMED_PADDING)
    return value


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "in_channels": partial(whole_number, at_least=0),
    "out_channels": partial(whole_number, at_least=0),
    "kernel_size": partial(height_and_width, at_least=0),
    "stride": partial(height_and_width, at_least=1),
    "padding": _padding,
    "dilation": partial(height_and_width, at_least=1),
    "groups": partial(whole_number, at_least=1),
    "padding_mode": text,
}
