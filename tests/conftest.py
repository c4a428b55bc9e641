"""What all tests share: a fixed seed, and networks small enough to look through."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
