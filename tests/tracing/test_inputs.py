"""What a network is called with when nobody says so."""

import pytest
import torch
import torch.nn as nn

import coconv_surgery as cs


class Says(nn.Module):
    """A network that says what it is called with, as Lightning's modules do."""

    def __init__(self, example):
        super().__init__()
        self.example_input_array = example
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, image, scale=1):
        return self.last(self.conv(image * scale))


IMAGE = torch.rand(1, 3, 16, 16)


@pytest.mark.parametrize("example", [IMAGE, (IMAGE, 2), {"image": IMAGE, "scale": 3}])
def test_a_network_is_planned_with_its_example_input_array(example):
    (row, _) = cs.plan_conversion(Says(example)).rows
    assert row.output_sizes == ((16, 16),)
    assert row.dilations == (1, 2, 3)


def test_an_input_size_wins_over_the_example():
    (row, _) = cs.plan_conversion(Says(IMAGE), input_size=8).rows
    assert row.output_sizes == ((8, 8),)


def test_an_example_of_a_wrong_kind_is_named():
    with pytest.raises(TypeError, match=r"the example_input_array of Says must be a tensor, a tuple .* not str"):
        cs.plan_conversion(Says("image"))
