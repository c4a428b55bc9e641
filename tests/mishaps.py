"""A collection of networks that go wrong, for other processes to build."""

import os
import sys
import time

import torch
import torch.nn as nn

import coconv_surgery as cs
from coconv_surgery.sweep.collections import Collection
from coconv_surgery.tracing.inputs import Inputs

NAMES = ["exits", "first", "killed", "last", "not built", "raises", "wrong shape"]


class Net(nn.Sequential):
    """A network whose forward goes wrong once it is converted, if its name says so."""

    def __init__(self, name: str) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        converted = isinstance(self[0], cs.CoConv2d)
        if self.name == "raises" and converted:
            raise ZeroDivisionError("as it was to be")
        return super().forward(x[..., 1:] if self.name == "wrong shape" and converted else x)


def list_names() -> list[str]:
    return NAMES


def build(name: str) -> tuple[nn.Module, Inputs]:
    if name == "not built":
        raise ImportError("/some/where/on/this/machine.py wants a package")
    if name == "killed":
        os.kill(os.getpid(), 9)
    if name == "exits":
        sys.exit("enough")
    if name == "slow":
        time.sleep(60)
    return Net(name).eval(), Inputs((torch.zeros(1, 3, 16, 16),))


MISHAPS = Collection("Mishaps", "torch", list_names, str.upper, build)
