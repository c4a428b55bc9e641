"""A copy of a network is in the evaluation mode that the network's own eval() makes."""

import pytest
import torch
import torch.nn as nn

from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.visit import Visit, on_a_copy

IMAGE = torch.randn(2, 3, 8, 8)


class Plain(nn.Module):
    """Leaves it to torch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.inner = nn.Dropout()
        self.mode = "training"

    def forward(self, x):
        return self.norm(self.conv(x))


class KeepsANorm(Plain):
    """As networks that adapt to the images of another domain."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self


class Tells(Plain):
    """Keeps a mode of its own, and returns nothing."""

    def train(self, mode=True):
        super().train(mode)
        self.mode = "training" if mode else "evaluation"


class Merges(KeepsANorm):
    """Changes its weights on the way, as adapters do."""

    def train(self, mode=True):
        self.conv.weight.data += 1
        self.mode = "merged"
        return super().train(mode)


class Fuses(KeepsANorm):
    """Has other modules afterwards."""

    def train(self, mode=True):
        super().train(mode)
        self.conv = nn.Conv2d(3, 3, 3)
        return self


class Refuses(Plain):
    """As what torch.export makes."""

    def eval(self):
        self.mode = "evaluation"
        raise NotImplementedError("exported")


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize(
    ("kind", "training", "mode"),
    [
        (Plain, set(), "training"),
        (KeepsANorm, {"norm"}, "training"),
        (Tells, set(), "evaluation"),
        (Fuses, {"norm"}, "training"),
        (Refuses, set(), "training"),
    ],
)
def test_a_copy_is_in_the_mode_that_eval_makes(kind, training, mode, fake):
    network = kind()
    with Visit(network, Inputs((IMAGE,))) as visit:
        copied = visit.twin(fake=fake).model
        assert {name for name, module in copied.named_modules() if module.training} == training
        assert copied.mode == mode
        assert dict(copied.named_modules()).keys() == dict(network.named_modules()).keys()
        del copied
    assert network.training


def test_weights_of_a_copy_are_those_of_the_network_whatever_eval_makes_of_them():
    network = Merges()

    def look(copied):
        assert copied.mode == "training"
        assert copied.norm.training
        assert torch.equal(copied.conv.weight, network.conv.weight)

    on_a_copy(network, Inputs((IMAGE,)), look)


def test_a_network_that_lets_nothing_be_set_is_evaluated():
    class Frozen(nn.Sequential):
        """Refuses changes once it was made."""

        def __setattr__(self, name, value):
            raise TypeError(f"no {name} is set any more")

    network = nn.Sequential(Plain())
    network.__class__ = Frozen
    on_a_copy(network, Inputs((IMAGE,)), lambda copied: copied(IMAGE))
