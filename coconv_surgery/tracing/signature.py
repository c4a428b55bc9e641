"""What makes a convolution the one that a plan means."""

from dataclasses import dataclass, fields
from typing import Any

import torch.nn as nn

from coconv_surgery.layers.functional import Pair

_PLAIN: dict[str, Any] = {
    "kernel_size": (1, 1),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


@dataclass(frozen=True)
class Signature:
    """What makes a convolution the one that a plan means; fields as in :class:`torch.nn.Conv2d`."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: nn.Module) -> "Signature":
        """Read the signature off a module; what other kinds of convolution lack is as in a plain one."""
        found: dict[str, Any] = {field.name: getattr(conv, field.name, None) for field in fields(cls)}
        for name, plain in _PLAIN.items():
            value = found[name]
            if isinstance(plain, tuple) and not isinstance(value, str):
                found[name] = (value, value) if isinstance(value, int) else tuple(value or plain)
                if len(found[name]) != 2 or not all(isinstance(side, int) for side in found[name]):
                    found[name] = plain
            elif value is None:
                found[name] = plain
        return cls(**found)

    def differences(self, planned: "Signature") -> str:
        """Say in words where a plan means another convolution."""
        pairs = ((field.name, getattr(self, field.name), getattr(planned, field.name)) for field in fields(self))
        return ", ".join(f"{name}={found}, planned {wanted}" for name, found, wanted in pairs if found != wanted)
