"""What all tests share: a fixed seed, networks small enough to look through, and the command line."""

import gc
import os
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from coconv_cli import main
from coconv_surgery.tracing.visit import garbage_stays

# Whether the operator for depthwise levels was built on this machine makes no difference: its tests build their own.
os.environ["COCONV_NATIVE"] = "0"
# OpenVINO reports each import from a process that it forks, which can block whatever is imported next; not in CI.
os.environ.setdefault("CI", "true")


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # of all devices, torch takes a millisecond
    # What torch 2.4 compiles with -ffast-math makes the whole process take the smallest numbers for zero.
    torch.set_flush_denormal(False)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports, which leave no garbage to speak of."""
    with garbage_stays():
        result = yield
    _set_aside_all_there_is()
    return result


@pytest.fixture(autouse=True)
def _garbage_is_that_of_one_test():
    yield
    _set_aside_all_there_is()


def _set_aside_all_there_is():
    """A look at all objects is then one at a test's own, and not at a million of modules and of other tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _configs_are_written_as_they_are():
    """Not as yapf lays them out, which takes a second or two for each."""
    with pytest.MonkeyPatch.context() as patch:
        if config := sys.modules.get("mmengine.config.config"):
            patch.setattr(config, "FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture(autouse=True)
def _no_process_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class TinyNet(nn.Module):
    """Two 3×3 convs of which CoConv may have the levels 3 and 2 at 32×32, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.norm(self.stem(x)).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> TinyNet:
    return TinyNet().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def tiny(monkeypatch):
    """A layer that takes no time, among those of the benchmark."""
    from coconv_surgery.bench import speed

    layer = speed._layer(8, 6, 2)
    for table in (speed.LAYERS, speed.SUBJECTS):
        monkeypatch.setitem(table, "tiny", layer)
    return layer


class Done(NamedTuple):
    """What a command came to."""

    code: int | str | None
    out: str
    err: str


@pytest.fixture
def coconv(monkeypatch, capsys):
    """Run the command in this process: what it exits with, and what it prints."""

    monkeypatch.delenv("COLUMNS", raising=False)  # which pytest sets

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["coconv", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        # What sys.exit() is given as a message, Python prints to standard error and makes exit code 1.
        message = stop.value.code if isinstance(stop.value.code, str) else ""
        return Done(1 if message else stop.value.code, out, err + message)

    return run
