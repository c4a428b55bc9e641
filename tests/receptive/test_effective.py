"""Effective receptive fields."""

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

import coconv_surgery as cs


def chain(depth=4):
    return nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(depth)))


def test_the_field_of_a_chain_of_ones_is_its_kernel_convolved_with_itself():
    model = chain(2).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    line = np.array([1, 2, 3, 2, 1]) / 3
    field = cs.effective_receptive_field(model, images=1, input_size=9)
    np.testing.assert_allclose(field.weight[2:7, 2:7], np.outer(line, line))
    assert field.area == (np.outer(line, line) > 1 - 0.9545).sum()
    assert field.side == 5
    assert field.name == "1"
    assert field.images == 1


def test_it_lies_within_the_theoretical_field():
    model = cs.convert(timm.create_model("resnet18"), input_size=64)
    field = cs.effective_receptive_field(model, "layer2.0.conv1", 2, input_size=64)
    assert not (field.weight > 0)[~cs.receptive_fields(model, 64)["layer2.0.conv1"].mask].any()


def test_reverted_is_the_plain_network_of_the_same_weights():
    plain = timm.create_model("resnet18", zero_init_last=False)
    before = cs.effective_receptive_field(plain, images=1, input_size=64)
    model = cs.convert(plain, input_size=64)
    np.testing.assert_array_equal(
        before.weight, cs.effective_receptive_field(model, images=1, input_size=64, reverted=True).weight
    )
    assert cs.effective_receptive_field(model, images=1, input_size=64).area > before.area


def test_the_network_stays_as_it_is():
    model = nn.Sequential(chain(1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 8, 3)).half().train()
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    field = cs.effective_receptive_field(model, images=2, input_size=12)
    assert field.weight.max() == 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_name_that_is_not_there_gets_a_hint():
    with pytest.raises(ValueError, match=r"layer='layer1.0.conv': .*did you mean .*'layer1.0.conv1'"):
        cs.effective_receptive_field(timm.create_model("resnet18"), "layer1.0.conv")


def test_a_network_without_a_gradient_is_refused():
    class Cut(nn.Sequential):
        def forward(self, x):
            return super().forward(x.detach())

    with pytest.raises(ValueError, match="layer: no convolution"):
        cs.effective_receptive_field(Cut(nn.Conv2d(3, 8, 3)), input_size=9)
