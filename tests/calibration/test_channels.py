"""Channels that are said to be free can change places, and those that cannot are not said to be."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from forwards import needs_modes_for_functions
from hypothesis import given
from hypothesis import strategies as st
from sampling import few
from scipy.optimize import linear_sum_assignment

from coconv_surgery.calibration.arranging import assign_levels
from coconv_surgery.calibration.channels import Side, find_orders


def orders_of(model, *batches):
    orders, _ = find_orders(model, lambda: [model(x) for x in batches])
    return orders


def free_weights(model, x):
    return {side.name for order in orders_of(model, x) for side in order.sides if side.dim == 0}


@torch.no_grad()
def shuffle(model, x):
    """Let all free channels change places at random."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    orders = orders_of(model, x)
    for order in orders:
        (count,) = {tensors[side.name].shape[side.dim] for side in order.sides}
        places = torch.randperm(count)
        for side in order.sides:
            tensors[side.name].copy_(tensors[side.name].index_select(side.dim, places))
    return orders


@pytest.mark.parametrize(
    "name",
    few(
        [
            *("resnet18", "resnet50", "seresnet50", "resnetv2_50", "res2net50_26w_4s", "ecaresnet26t", "skresnet18"),
            *("efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_large_100", "ghostnet_100", "mixnet_s"),
            *("vgg11_bn", "densenet121", "inception_v3", "dla34", "hrnet_w18_small", "regnety_032", "regnetx_002"),
            *("repvgg_a0", "cspresnet50", "convnext_atto", "nf_resnet50", "test_byobnet", "vovnet39a", "xception41"),
            *("selecsls42", "rexnet_100", "hardcorenas_a", "mobileone_s0", "edgenext_xx_small", "darknet53"),
        ],
        14,
    ),
)
def test_a_network_computes_the_same_when_its_free_channels_change_places(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.8, 1.2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        before = model(x)
        shuffle(model, x)
        after = model(x)
    assert (after - before).norm() <= 1e-4 * before.norm()


def test_all_of_a_residual_path_is_one_order_and_what_is_within_a_block_another():
    model = timm.create_model("resnet18").eval()
    orders = orders_of(model, torch.randn(1, 3, 64, 64))
    by_side = {(side.name, side.dim): order for order in orders for side in order.sides}
    path = by_side["conv1.weight", 0]
    assert path is by_side["layer1.0.conv2.weight", 0] is by_side["layer1.1.conv2.weight", 0]
    assert path is by_side["layer2.0.conv1.weight", 1] is by_side["layer2.0.downsample.0.weight", 1]
    assert by_side["layer1.0.conv1.weight", 0] is by_side["layer1.0.conv2.weight", 1] is not path
    assert ("fc.weight", 0) not in by_side
    assert ("fc.weight", 1) in by_side


def test_a_scale_is_that_of_the_norm_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.5), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(1, 2)
        model[1].weight.uniform_(1, 2)
    (order,) = orders_of(model, *torch.randn(3, 1, 3, 8, 8))
    torch.testing.assert_close(order.scales["0.weight"], model[1].weight / (model[1].running_var + 0.5).sqrt())


def test_a_convolution_with_two_norms_behind_has_no_scale():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
            self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.5)

        def forward(self, x):
            x = self.conv(x)
            return self.head(self.norm(x) + self.other(x))

    (order,) = orders_of(Two().eval(), torch.randn(1, 3, 8, 8))
    assert not order.scales


class Reader(nn.Module):
    """A convolution whose output is read in some way, and then by another."""

    def __init__(self, read, width=4, groups=1):
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 4, 3, padding=1), read
        self.behind = nn.Conv2d(width, 8, 3, padding=1, groups=groups)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.behind(self.read(self.conv(x))))


def group_norm(x):
    return F.group_norm(x, 2)


READERS = {
    "a concatenation": Reader(lambda x: torch.cat((x, x), 1), 8),
    "a slice": Reader(lambda x: x[:, :2], 2),
    "a flip": Reader(lambda x: x.flip(1)),
    "a group norm": Reader(group_norm),
    "a softmax over channels": Reader(lambda x: x.softmax(1)),
    "a mean over channels": Reader(lambda x: x - x.mean(1, keepdim=True)),
    "a number for each channel": Reader(lambda x: x * torch.arange(4.0)[:, None, None]),
    "a pixel shuffle": Reader(lambda x: F.pixel_shuffle(x, 2), 1),
    "another view": Reader(lambda x: x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)),
    "numpy": Reader(lambda x: torch.from_numpy(x.detach().sigmoid().numpy())),
    "a grouped convolution": Reader(lambda x: x, 4, groups=2),
    "a sum with its own transpose": Reader(lambda x: x + x.transpose(2, 3)),
}


@pytest.mark.parametrize("reader", READERS)
def test_channels_that_are_read_by_position_stay_where_they_are(reader):
    assert "conv.weight" not in free_weights(READERS[reader].eval(), torch.randn(1, 3, 8, 8))


@needs_modes_for_functions
def test_channels_that_an_operator_of_functions_reads_stay_where_they_are():
    reader = Reader(lambda x: torch.ops.higher_order.cond(True, torch.relu, torch.sigmoid, (x,)))
    assert "conv.weight" not in free_weights(reader.eval(), torch.randn(1, 3, 8, 8))


def test_channels_that_the_network_returns_stay_where_they_are():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            features = self.first(x)
            return {"features": [features], "out": self.third(self.second(features))}

    assert free_weights(Both().eval(), torch.randn(1, 4, 8, 8)) == {"second.weight", "second.bias"}


class Block(nn.Module):
    """Two convolutions, of which the channels between can change places if nobody else reads them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(self.second(self.read(self.first(x).relu())).relu())

    def read(self, features):
        return features


class Trains(Block):
    """An auxiliary head that training alone runs."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Conv2d(4, 3, 1)


class Large(Block):
    """A branch that some images take."""

    def __init__(self):
        super().__init__()
        self.big = nn.Conv2d(4, 4, 1)

    def read(self, features):
        return self.big(features) if features.shape[-1] > 8 else features


class Average(Block):
    """A slow copy of its own weights, as momentum contrast has it."""

    def __init__(self):
        super().__init__()
        self.slow = copy.deepcopy(self.first)


class Keeps(Block):
    """Features kept for a loss."""

    def read(self, features):
        self.kept = features
        return features


class Leaves(Block):
    """Features that leave torch without an operation."""

    def read(self, features):
        features.numpy()
        return features


class Lists(Block):
    """The same as a list."""

    def read(self, features):
        features.tolist()
        return features


class Filtered(Block):
    """A filter that no file keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", torch.randn(4, 1, 3, 3), persistent=False)

    def read(self, features):
        return F.conv2d(features, self.filter, padding=1, groups=4)


class Masks(Block):
    """A weight changed by a mask in the forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.arange(4.0)[:, None, None, None])

    def forward(self, x):
        self.first.weight.data.mul_(self.mask)
        return super().forward(x)


@pytest.mark.parametrize("block", [Trains, Large, Average, Keeps, Leaves, Lists, Filtered, Masks])
def test_channels_that_somebody_else_may_read_stay_where_they_are(block):
    model = block().eval()
    assert "first.weight" in free_weights(Block().eval(), torch.randn(1, 3, 8, 8))
    assert "first.weight" not in free_weights(model, torch.randn(1, 3, 8, 8))


class Pools(Block):
    """An auxiliary head that training alone runs, on pooled and flattened features."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))

    def read(self, features):
        return features + self.aux(features).mean() if self.training else features


class Joins(Block):
    """One that reads two maps at once."""

    def __init__(self):
        super().__init__()
        self.norm, self.aux = nn.BatchNorm2d(4), nn.Conv2d(7, 5, 1)

    def forward(self, x):
        features = self.norm(self.first(x)).relu()
        aux = self.aux(torch.cat([x, features], 1)).mean() if self.training else 0
        return self.out(self.second(features).relu()) + aux


@pytest.mark.parametrize("block", [Pools, Joins])
def test_channels_that_training_alone_reads_stay_where_they_are(block):
    def train():
        ran.append(True)
        return model.train()(image)

    model, image, ran = block().eval(), torch.randn(2, 3, 8, 8), []
    orders, unseen = find_orders(model, lambda: [model(image)], train)
    assert ran
    assert not unseen
    names = {side.name for order in orders for side in order.sides}
    assert "first.weight" not in names
    assert "second.weight" in names


def test_a_network_that_runs_whole_is_not_run_as_in_training():
    model = Block().eval()
    find_orders(model, lambda: [model(torch.randn(1, 3, 8, 8))], pytest.fail)


def test_what_runs_nowhere_is_told():
    def fail():
        raise ValueError("targets, please")

    model = Pools().eval()
    _, unseen = find_orders(model, lambda: [model(torch.randn(1, 3, 8, 8))], fail)
    assert unseen == {"aux.2.weight"}


def test_a_branch_that_some_images_take_is_seen_where_they_are_among_the_images():
    model = Large().eval()
    orders, _ = find_orders(model, lambda: [model(torch.randn(1, 3, side, side)) for side in (8, 16)])
    (order,) = [order for order in orders if Side("first.weight", 0) in order.sides]
    assert {Side("big.weight", 0), Side("big.weight", 1)} <= order.sides


def test_a_convolution_that_runs_on_several_maps_orders_all_of_them():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.laterals = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(2))
            self.shared, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return [self.out(self.shared(lateral(x)).relu()) for lateral in self.laterals]

    model, x = Head().eval(), torch.randn(1, 3, 8, 8)
    before = model(x)
    orders = shuffle(model, x)
    for one, other in zip(before, model(x), strict=True):
        torch.testing.assert_close(one, other)
    sides = [{(side.name, side.dim) for side in order.sides} for order in orders]
    assert {("laterals.0.weight", 0), ("laterals.1.weight", 0), ("shared.weight", 1)} <= max(sides, key=len)


costs = st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=6, max_size=24)


def cost_of(table, levels, places):
    return float(table[places, levels].sum())


@given(costs, st.randoms(use_true_random=False))
def test_an_assignment_is_a_permutation_that_costs_no_more_than_none(table, random):
    table = torch.tensor(table, dtype=torch.float64)
    levels = torch.tensor([random.randrange(3) for _ in table])
    places = assign_levels(table, levels)
    assert sorted(places.tolist()) == list(range(len(table)))
    own = torch.arange(len(table))
    assert cost_of(table, levels, places) <= cost_of(table, levels, own) + 1e-9
    assert (table.gather(1, levels[:, None]).sum() - cost_of(table, levels, places)) >= -1e-9


@given(costs, st.randoms(use_true_random=False))
def test_no_assignment_costs_less(table, random):
    table = torch.tensor(table, dtype=torch.float64)
    levels = torch.tensor([random.randrange(3) for _ in table])
    best = table[:, levels].numpy()
    found = cost_of(table, levels, assign_levels(table, levels))
    assert found == pytest.approx(best[linear_sum_assignment(best)].sum(), abs=1e-6)


def test_no_assignment_of_many_channels_costs_less():
    table = torch.rand(256, 4, generator=torch.Generator().manual_seed(0)).double() * torch.arange(4)
    levels = torch.arange(4).repeat_interleave(64)
    best = table[:, levels].numpy()
    found = cost_of(table, levels, assign_levels(table, levels))
    assert found == pytest.approx(best[linear_sum_assignment(best)].sum())
