"""The losses against what can be worked out by hand, and their double backward against plain convolutions."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import coconv_surgery as cs
from coconv_surgery.generation.losses import discriminator_losses, generator_loss
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.zoo.progan import Discriminator


def test_losses_of_a_linear_discriminator_are_as_worked_out_by_hand():
    reals, fakes = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), -0.5)
    losses = discriminator_losses(lambda x: 3 * x.sum((1, 2, 3)), reals, fakes, torch.tensor([0.2, 0.9]))
    assert losses["loss_wasserstein"] == -6 - 12
    assert losses["loss_penalty"].item() == pytest.approx(10 * (6 - 1) ** 2)  # a gradient of four threes
    assert losses["loss_drift"].item() == pytest.approx(0.001 * 144)


def test_a_target_other_than_one_scales_the_penalty():
    reals = torch.zeros(2, 1, 2, 2)
    losses = discriminator_losses(
        lambda x: 3 * x.sum((1, 2, 3)), reals, reals, torch.rand(2), penalty=5.0, target=750.0
    )
    assert losses["loss_penalty"].item() == pytest.approx(5 * (6 - 750) ** 2 / 750**2)


def test_the_gradient_is_taken_at_the_mix():
    seen = []

    def square(x):
        seen.append(x.detach())
        return x.square().sum((1, 2, 3)) / 2

    reals, fakes, mix = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 5.0), torch.tensor([0.25, 1.0])
    losses = discriminator_losses(square, reals, fakes, mix)
    assert seen[2].flatten().tolist() == [2, 5]
    assert losses["loss_penalty"].item() == pytest.approx(10 * ((2 - 1) ** 2 + (5 - 1) ** 2) / 2)


def test_a_loss_scale_changes_nothing_in_single_precision():
    network, reals, fakes = Discriminator((6, 4)), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    plain, scaled = (
        discriminator_losses(network, reals, fakes, torch.full((4,), 0.5), loss_scale=scale) for scale in (1, 1024)
    )
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_the_largest_loss_scale_of_half_precision_overflows_nothing():
    reals = torch.ones(4, 3, 8, 8)
    network = Discriminator((6, 4)).half()
    scored = lambda x: network(x.half())  # noqa: E731
    found = discriminator_losses(scored, reals, -reals, torch.full((4,), 0.5), loss_scale=2.0**16)
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_a_gradient_of_zero_is_penalised_without_nan():
    weight = torch.zeros((), requires_grad=True)
    losses = discriminator_losses(lambda x: weight * x.sum((1, 2, 3)), *torch.ones(2, 2, 1, 1, 1), torch.rand(2))
    sum(losses.values()).backward()
    assert losses["loss_penalty"] == 10
    assert weight.grad.isfinite()


def test_the_generator_wants_high_scores():
    assert generator_loss(torch.tensor([1.0, 3.0])) == -2


class NaiveCoConv(nn.Module):
    """A contextual convolution written out: one convolution a level, of the same parameters."""

    def __init__(self, conv: CoConv2d):
        super().__init__()
        self.weight, self.bias, self.scale = conv.weight, conv.bias, conv.scale
        self.dilations, self.splits = conv.dilations, conv.splits

    def forward(self, x):
        weights, biases = (self.weight * self.scale).split(self.splits), self.bias.split(self.splits)
        levels = zip(weights, biases, self.dilations, strict=True)
        return torch.cat([F.conv2d(x, w, b, padding=d, dilation=d) for w, b, d in levels], 1)


def test_gradients_through_the_penalty_equal_those_of_naive_levels():
    network = cs.convert(Discriminator((12, 12, 8)), "resolution", split="even").double()
    levels = [module for module in network.modules() if isinstance(module, CoConv2d)]
    assert [len(conv.dilations) for conv in levels] == [2, 2, 3, 3]
    images = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)

    def gradients():
        losses = discriminator_losses(lambda x: network(x, fade=0.4), *images, torch.full((4,), 0.3).double())
        return torch.autograd.grad(losses["loss_penalty"], parameters, allow_unused=True)

    parameters = list(network.parameters())
    ours = gradients()
    for block in network.blocks[1:]:
        block.conv0, block.conv1 = NaiveCoConv(block.conv0), NaiveCoConv(block.conv1)
    naive = gradients()
    touched = [(a, b) for a, b in zip(ours, naive, strict=True) if b is not None and b.abs().max() > 0]
    assert len(touched) > 10
    for a, b in touched:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_gradients_through_the_penalty_are_those_of_finite_differences():
    network = cs.convert(Discriminator((4, 4)), "uniform(2)").double()
    images, mix = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.3, 0.6]).double()
    conv = network.blocks[1].conv0

    def penalty(weight):
        call = lambda x: torch.func.functional_call(network, {"blocks.1.conv0.weight": weight}, x)  # noqa: E731
        return discriminator_losses(call, *images, mix)["loss_penalty"].double()

    weight = conv.weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(weight), weight)
    step = torch.randn_like(weight)
    step *= 1e-3 / step.norm()
    difference = (penalty(weight.detach() + step) - penalty(weight.detach() - step)) / 2
    assert difference.item() == pytest.approx((gradient * step).sum().item(), rel=1e-2, abs=1e-6)
