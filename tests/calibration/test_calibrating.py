"""Trained networks that were converted keep what they learnt."""

import copy
import io
import itertools
import pickle
import sys
import warnings

import pytest
import timm
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from faults import every_fault
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch.utils.data import DataLoader, TensorDataset

import coconv_surgery as cs
from conftest import TinyNet

SIZE = (1, 64, 64)


@pytest.fixture
def converted(trained):
    return cs.convert(copy.deepcopy(trained.model), input_size=SIZE)


def smooth(*shape, **kwargs):
    """Images that have something in common from pixel to pixel, as real ones do."""
    return F.avg_pool2d(torch.randn(*shape, **kwargs), 5, stride=1, padding=2)


def converted_tiny():
    torch.manual_seed(0)
    return cs.convert(TinyNet().eval(), input_size=32)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What it is for.


def test_a_trained_network_keeps_what_it_learnt(trained, converted):
    before, cold = trained.accuracy(trained.model), trained.accuracy(converted)
    report = cs.calibrate(converted, trained.held_out)
    after = trained.accuracy(converted)
    assert cold <= before - 5
    assert after >= before - 1
    assert report.images == 64
    assert len(report.solved) == 4


def test_the_error_of_every_layer_falls(trained, converted):
    for row in cs.calibrate(converted, trained.held_out).layers:
        assert row.after < row.before, row


def test_channels_that_change_places_leave_less_to_solve(trained, converted):
    in_place = copy.deepcopy(converted)
    moved = cs.calibrate(converted, trained.held_out)
    stayed = cs.calibrate(in_place, trained.held_out, arrange=False)
    assert moved.arranged[0] > 0
    assert stayed.arranged == (0, 0)
    assert sum(row.after for row in moved.layers) < sum(row.after for row in stayed.layers)


def test_plain_convolutions_behind_contextual_ones_are_solved_by_name(trained, converted):
    report = cs.calibrate(converted, trained.held_out[:32], also="layer[34].*")
    names = [row.name for row in report.layers]
    assert names[:4] == [row.name for row in cs.get_plan(converted).converted]
    assert {"layer3.0.conv1", "layer3.0.downsample.0", "layer4.0.conv2"} <= set(names)
    assert trained.accuracy(converted) >= trained.accuracy(trained.model) - 1


def test_a_conversion_calibrates_in_one_call(trained):
    model = cs.convert(copy.deepcopy(trained.model), input_size=SIZE, calibrate=trained.held_out)
    again = cs.convert(copy.deepcopy(trained.model), input_size=SIZE)
    cs.calibrate(again, trained.held_out)
    assert same_weights(weights(model), weights(again))
    assert trained.accuracy(model) >= trained.accuracy(trained.model) - 1


# What it leaves alone.


def test_parameters_are_the_same_objects_and_an_optimizer_keeps_its_state(trained, converted):
    optimizer = torch.optim.SGD(converted.parameters(), 0.1, momentum=0.9)
    F.cross_entropy(converted(trained.images[:8]), trained.labels[:8]).backward()
    optimizer.step()
    converted.layer1[0].conv1.weight.requires_grad_(False)
    objects, flags = ([(n, f(p)) for n, p in converted.named_parameters()] for f in (id, lambda p: p.requires_grad))
    kept = {id(p): (s["momentum_buffer"], s["momentum_buffer"].clone()) for p, s in optimizer.state.items()}
    cs.calibrate(converted, trained.held_out)
    assert [(name, id(p)) for name, p in converted.named_parameters()] == objects
    assert [(name, p.requires_grad) for name, p in converted.named_parameters()] == flags
    for parameter, held in optimizer.state.items():
        buffer, numbers = kept[id(parameter)]
        assert held["momentum_buffer"] is buffer
        assert torch.equal(buffer, numbers)


def test_in_place_only_the_kernels_of_contextual_convolutions_change(trained, converted):
    before = weights(converted)
    report = cs.calibrate(converted, trained.held_out, arrange=False)
    after = weights(converted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{row.name}.weight" for row in report.solved}


@pytest.mark.parametrize("also", [None, "*"])
def test_a_network_without_contextual_convolutions_stays_as_it_is_to_the_bit(also):
    model = TinyNet()
    cs.to_coconv_(model.body[0], (1,), (8,))
    before = weights(model)
    report = cs.calibrate(model, torch.randn(4, 3, 32, 32), also=also)
    assert report.layers == ()
    assert same_weights(before, weights(model))


def test_frozen_parameters_stay_if_they_are_to(trained, converted):
    converted.layer1.requires_grad_(False)
    before = weights(converted.layer1)
    report = cs.calibrate(converted, trained.held_out, frozen=False)
    assert {row.skipped for row in report.layers if row.name.startswith("layer1")} == {"its kernels are frozen"}
    assert same_weights(before, weights(converted.layer1))
    assert all(row.skipped is None for row in report.layers if row.name.startswith("layer2"))


def test_flags_statistics_hooks_and_random_numbers_stay(converted, trained):
    converted.train()
    seen = []
    converted.layer1.register_forward_hook(lambda *_: seen.append(1))
    running, random = converted.bn1.num_batches_tracked.clone(), torch.get_rng_state()
    images = trained.held_out.clone()
    cs.calibrate(converted, images)
    assert converted.training
    assert all(module.training for module in converted.modules())
    assert torch.equal(converted.bn1.num_batches_tracked, running)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, trained.held_out)
    assert not seen


# Images in whatever form.


def calibrated_by(images, **choices):
    model = converted_tiny()
    cs.calibrate(model, images, **choices)
    return weights(model)


def run_batches(batches):
    def run(model):
        for batch in batches:
            model(batch).sum()

    return run


def test_images_come_in_any_form():
    images = smooth(32, 3, 32, 32)
    expected, halves = calibrated_by(images), list(images.split(16))
    labelled = TensorDataset(images, torch.zeros(32, dtype=torch.long))
    forms = {
        "batches": halves,
        "a generator": (batch for batch in halves),
        "dicts": [{"x": batch} for batch in halves],
        "tuples": [(batch,) for batch in halves],
        "Inputs": [cs.Inputs((batch,)) for batch in halves],
        "Inputs that say what to call": [cs.Inputs((batch,), call=lambda net, x: net.forward(x)) for batch in halves],
        "a loader": DataLoader(TensorDataset(images), batch_size=16),
        "a loader with labels": DataLoader(labelled, batch_size=16),
        "a function": run_batches(halves),
        "double precision": images.double(),
    }
    for form, given in forms.items():
        assert same_weights(calibrated_by(given), expected), form


def test_no_more_images_are_read_than_wanted():
    def endless():
        while True:
            yield smooth(4, 3, 32, 32)

    assert cs.calibrate(converted_tiny(), endless(), max_images=8).images == 8


# Networks of all kinds.


def image_net(conv):
    torch.manual_seed(0)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(), nn.Conv2d(conv.out_channels, 4, 1)).eval()


@pytest.mark.parametrize(
    ("make", "share"),  # without gains, kernels have one length, and cannot be as short as would be best
    [(StdConv2d, 0.95), (StdConv2dSame, 0.95), (ScaledStdConv2d, 0.7), (ScaledStdConv2dSame, 0.7)],
)
def test_standardised_kernels_are_solved_through_their_standardisation(make, share):
    model = image_net(make(6, 16, 3, stride=2, padding="SAME" if "Same" in make.__name__ else 1))
    plain = copy.deepcopy(model)
    cs.to_coconv_(model[0], (1, 2, 3), (8, 4, 4))
    images = smooth(16, 6, 24, 24)
    with torch.no_grad():
        wanted, cold = plain[0](images), model[0](images)
        (row,) = cs.calibrate(model, images, arrange=False).layers
        found = model[0](images)
    assert row.skipped is None
    assert (found - wanted).norm() < share * (cold - wanted).norm()
    assert type(model[0]).__name__ == f"Co{make.__name__}"


def test_kernels_that_others_compute_are_left_with_the_reason():
    model = image_net(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1)))
    cs.convert(model, input_size=32)
    before = weights(model)
    (row,) = cs.calibrate(model, smooth(4, 3, 32, 32)).layers
    assert row.skipped == "its kernels are computed from other parameters"
    assert same_weights(before, weights(model))


class Pyramid(nn.Module):
    """One head on maps of three sizes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        features = self.stem(x).relu()
        return [self.head(F.avg_pool2d(features, size)) for size in (1, 2, 4)]


def test_a_convolution_shared_over_a_pyramid_is_solved_for_all_its_calls():
    torch.manual_seed(0)
    plain = Pyramid().eval()
    model, images = cs.convert(copy.deepcopy(plain), input_size=64), smooth(16, 3, 64, 64)
    with torch.no_grad():
        wanted, cold = plain(images), model(images)
        report = cs.calibrate(model, images)
        found = model(images)
    assert {row.name: row.positions for row in report.solved}["head.0"] > 40_000 / 2
    for one, other, goal in zip(found, cold, wanted, strict=True):
        assert (one - goal).norm() < 0.9 * (other - goal).norm()


def test_modules_that_share_a_weight_are_solved_together():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)), nn.Conv2d(8, 2, 1)).eval()
    model[1].weight = model[0].weight
    cs.convert(model, input_size=(8, 32, 32))
    (row,) = cs.calibrate(model, smooth(16, 8, 32, 32), arrange=False).layers
    assert model[1].weight is model[0].weight
    assert row.after < row.before


@pytest.mark.parametrize("trace", [fx.symbolic_trace, lambda net: torch.export.export(net, (image(),)).module()])
def test_a_graph_is_calibrated_as_its_network_is(trace):
    torch.manual_seed(0)
    net = TinyNet().eval()
    graph = trace(copy.deepcopy(net))
    images = smooth(16, 3, 32, 32)
    for model in (net, graph):
        cs.convert(model, input_size=32)
    runs = [images[i : i + 1] for i in range(16)]  # an export has one batch size
    names = [[row.name for row in cs.calibrate(model, runs).solved] for model in (net, graph)]
    assert names[0] == names[1] != []
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(graph.get_parameter(name), parameter)

    with pytest.warns(cs.CalibratedWeightsWarning):
        cs.convert(graph, "uniform(2)", input_size=32)
    assert cs.get_plan(graph).summary().endswith("calibrated on 16 images before levels changed")


def image():
    return torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_kept_and_summed_up_in_single_precision_or_better(dtype, trained):
    model = cs.convert(copy.deepcopy(trained.model).to(dtype), input_size=SIZE)
    report = cs.calibrate(model, trained.held_out[:16])
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert all(row.after < 0.6 * row.before for row in report.layers)


def test_the_order_of_memory_makes_no_difference():
    images, reports = smooth(8, 3, 32, 32), []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = converted_tiny().to(memory_format=memory)
        reports.append(cs.calibrate(model, images, also="*"))
        assert model.stem.weight.is_contiguous(memory_format=memory)
    for one, other in zip(*(report.layers for report in reports), strict=True):
        assert one.after == pytest.approx(other.after, rel=1e-4)


def test_norms_that_the_network_keeps_in_training_mode_are_so_in_its_copies():
    class Adaptive(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].train()
            return self

    images, rows = smooth(8, 3, 32, 32), []
    for kind, tracks in ((Adaptive, True), (nn.Sequential, False)):
        torch.manual_seed(0)
        convs = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        norm = nn.BatchNorm2d(8, track_running_stats=tracks)
        rows.append(cs.calibrate(cs.convert(kind(convs[0], norm, *convs[1:]), input_size=32), images).layers)
    assert rows[0] == rows[1]


class Picks(nn.Module):
    """Runs a convolution on the crop where its features are strongest, as a second stage does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        features = self.first(x)
        crops = []
        for one in features:
            # So sensitive that another network picks another crop.
            place = int((one.double().sum() * 1e6) % 32)
            crops.append(one[:, place : place + 32, place : place + 32])
        return self.out(self.second(torch.stack(crops)))


def test_a_layer_that_runs_on_other_things_than_before_is_solved_for_its_own_inputs():
    torch.manual_seed(0)
    model = cs.convert(Picks().eval(), input_size=64, include="*")
    report = cs.calibrate(model, torch.randn(16, 3, 64, 64), arrange=False)
    rows = {row.name: row for row in report.layers}
    assert rows["first"].note is None
    assert "solved for its own inputs" in rows["second"].note
    assert rows["second"].after < rows["second"].before


def test_a_network_of_timm_is_calibrated_with_depthwise_convolutions():
    model = timm.create_model("mobilenetv2_035").eval()
    cs.convert(model, input_size=64)
    report = cs.calibrate(model, smooth(8, 3, 64, 64))
    assert len(report.solved) == len(cs.get_plan(model).converted)
    assert report.arranged[1] > 0


def test_sites_that_share_kernels_and_convolve_otherwise_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)).eval()
    model[1].weight = model[0].weight
    cs.to_coconv_(model[0], (1, 2), (4, 4))
    before = weights(model)
    (row,) = cs.calibrate(model, smooth(8, 8, 16, 16)).layers
    assert row.skipped == "its kernels are also those of 1, which convolves otherwise"
    assert same_weights(before, weights(model))


def test_parameters_in_the_memory_of_others_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)).eval()
    model[1].weight = nn.Parameter(model[0].weight.data)
    cs.convert(model, input_size=(8, 16, 16))
    before = weights(model)
    rows = cs.calibrate(model, smooth(8, 8, 16, 16)).layers
    assert [row.skipped for row in rows] == [f"its kernels share memory with {i}.weight" for i in (1, 0)]
    assert same_weights(before, weights(model))


def test_parameters_in_the_memory_of_a_buffer_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)).eval()
    model.register_buffer("average", model[0].weight.data[:4])
    cs.convert(model, input_size=(8, 16, 16))
    before = weights(model)
    (row,) = cs.calibrate(model, smooth(8, 8, 16, 16)).layers
    assert row.skipped == "its kernels share memory with average"
    assert same_weights(before, weights(model))


def test_parameters_side_by_side_in_one_memory_are_solved():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)).eval()
    flat = torch.randn(2, 8, 8, 3, 3) / 9
    for conv, part in zip(model[:2], flat, strict=True):
        conv.weight = nn.Parameter(part)
    cs.convert(model, input_size=(8, 16, 16))
    assert [row.skipped for row in cs.calibrate(model, smooth(8, 8, 16, 16)).layers] == [None, None]


def test_kernels_that_are_one_number_shown_often_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)).eval()
    model[0].weight = nn.Parameter(torch.ones(8, 1, 1, 1).expand(8, 8, 3, 3))
    cs.convert(model, input_size=(8, 16, 16))
    (row,) = cs.calibrate(model, smooth(8, 8, 16, 16)).layers
    assert row.skipped == "its kernels are few numbers that are shown several times"


class ReadsElsewhere(nn.Module):
    """A network that uses a parameter of its convolutions outside of them."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.plain, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.read = read

    def forward(self, x):
        y = self.plain(self.conv(x).relu())
        return self.out(y + self.read(self).view(1, -1, 1, 1))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("conv.bias", lambda net: net.conv.bias * 2),
        ("conv.bias", lambda net: net.conv.bias.detach()[:4].sigmoid().repeat(2)),
        ("conv.bias", lambda net: torch.tensor(net.conv.bias.tolist())),
        ("conv.weight", lambda net: net.conv.weight.sum((1, 2, 3))),
        ("plain.weight", lambda net: net.plain.weight.sum((1, 2, 3))),
    ],
    ids=["a bias", "a part of it", "its numbers", "kernels", "a plain convolution's"],
)
def test_a_parameter_that_is_read_elsewhere_stays(name, read):
    model = ReadsElsewhere(read).eval()
    cs.to_coconv_(model.conv, (1, 2), (4, 4))
    before = weights(model)
    rows = {row.name: row for row in cs.calibrate(model, smooth(8, 3, 32, 32), also="*", arrange=False).layers}
    after = weights(model)
    assert torch.equal(before[name], after[name])
    skipped = [conv for conv, row in rows.items() if row.skipped]
    assert skipped == ([name.removesuffix(".weight")] if name.endswith(".weight") else [])


def test_parameters_whose_size_alone_is_read_are_solved():
    model = cs.convert(ReadsElsewhere(lambda net: torch.zeros_like(net.conv.bias)).eval(), input_size=32)
    assert cs.calibrate(model, smooth(8, 3, 32, 32)).layers[0].skipped is None


def test_what_a_network_makes_when_it_first_runs_is_not_kept():
    class Lazy(TinyNet):
        def forward(self, x):
            if "seen" not in self._buffers:
                self.register_buffer("seen", torch.zeros(3))
                self.more = nn.Conv2d(3, 3, 1)
            return super().forward(self.more(x) + self.seen.view(1, 3, 1, 1))

    model = cs.convert(Lazy().eval(), input_size=32)
    names = list(model.state_dict())
    assert cs.calibrate(model, smooth(8, 3, 32, 32)).solved
    assert list(model.state_dict()) == names


def test_a_network_that_computes_otherwise_where_it_is_watched_is_calibrated():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x):
            tokens = nn.functional.avg_pool2d(self.last(self.conv(x).relu()), 4).flatten(2).transpose(1, 2)
            padding = torch.arange(tokens.shape[1]).expand(tokens.shape[:2]) >= 48
            return self.encoder(tokens, src_key_padding_mask=padding)

    model = cs.convert(Attends().eval(), "uniform(2)", input_size=32)
    assert cs.calibrate(model, smooth(8, 3, 32, 32), arrange=False).solved


def test_a_calibration_computes_in_the_precision_of_the_network_whatever_is_cast_around_it():
    def under_autocast(images):
        with torch.autocast("cpu", torch.bfloat16):
            return calibrated_by(images)

    images = smooth(16, 3, 32, 32)
    assert same_weights(calibrated_by(images), under_autocast(images))


class Remembers(nn.Module):
    """A network that keeps its features from one call to the next."""

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.kept = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.kept = x if self.kept is None or self.kept.shape != x.shape else 0.5 * self.kept + x
        return self.out(self.conv(self.kept).relu()) / self.count


def test_a_network_that_keeps_something_is_solved_as_if_each_run_were_its_first():
    torch.manual_seed(0)
    plain = cs.convert(Remembers().eval(), input_size=32)
    other, images = copy.deepcopy(plain), smooth(32, 3, 32, 32)
    report = cs.calibrate(plain, images)
    single = [cs.calibrate(other, images[:16], max_images=16), plain.count, plain.kept]
    assert all(row.after < row.before for row in report.solved)
    assert single[1:] == [0, None]


def test_a_network_that_draws_numbers_draws_the_same_ones_each_time():
    class Noisy(TinyNet):
        def forward(self, x):
            return super().forward(x + 0.1 * torch.randn_like(x))

    torch.manual_seed(0)
    model = cs.convert(Noisy().eval(), input_size=32)
    rows = cs.calibrate(model, smooth(16, 3, 32, 32)).layers
    assert all(row.after < row.before for row in rows)


def test_a_network_that_does_not_compute_the_same_twice_is_refused():
    class Clock(TinyNet):
        def forward(self, x):
            return super().forward(x) + next(numbers)

    numbers = iter(range(10**6))
    model = cs.convert(Clock().eval(), input_size=32)
    with pytest.raises(cs.CalibrationError, match="does not compute the same twice"):
        cs.calibrate(model, smooth(4, 3, 32, 32))


def test_a_function_may_do_to_its_network_what_it_likes():
    images = smooth(16, 3, 32, 32)

    def evaluate_and_train_on(net):
        net(images)
        net.train()
        with torch.no_grad():
            net.stem.weight.mul_(2)

    assert same_weights(calibrated_by(evaluate_and_train_on), calibrated_by(images))


def test_labels_are_not_given_to_an_argument_that_need_not_be_there():
    class Masked(TinyNet):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask[:, None, None, None])

    images, rows = smooth(16, 3, 32, 32), []
    for batch in (images, (images, torch.zeros(16))):
        torch.manual_seed(0)
        rows.append(cs.calibrate(cs.convert(Masked().eval(), input_size=32), [batch]).layers)
    assert rows[0] == rows[1]


def test_an_input_that_is_taken_for_a_label_is_told():
    class Conditioned(TinyNet):
        def forward(self, x, condition=None):
            return super().forward(x)

    images = smooth(16, 3, 32, 32)

    def note(network, batch):
        return cs.calibrate(cs.convert(network().eval(), input_size=32), [batch]).note

    assert note(Conditioned, (images, torch.zeros(16))) == (
        "the last 1 of each batch taken for labels: give Inputs if the network is to have them"
    )
    assert note(TinyNet, (images, torch.zeros(16))) is None
    assert note(Conditioned, cs.Inputs((images, torch.zeros(16)))) is None


# What is known of it afterwards.


def test_the_plan_the_state_dict_and_the_file_say_on_how_many_images(tmp_path):
    model = converted_tiny()
    assert cs.get_plan(model).calibrated == 0
    cs.calibrate(model, smooth(8, 3, 32, 32))
    assert cs.get_plan(model).calibrated == 8
    assert cs.get_plan(model).summary().endswith("calibrated on 8 images")
    assert cs.plan_of(model.state_dict()).calibrated == 8
    cs.save_converted(model, tmp_path / "net.safetensors")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    for file in ("net.safetensors", "net.pth"):
        assert cs.plan_of(tmp_path / file).calibrated == 8
        assert cs.get_plan(cs.load_converted(TinyNet(), tmp_path / file)).calibrated == 8


def test_a_plan_is_of_levels_and_does_not_say_that_other_weights_were_calibrated():
    model = converted_tiny()
    cs.calibrate(model, smooth(8, 3, 32, 32))
    assert cs.get_plan(cs.apply_plan(TinyNet(), cs.get_plan(model))).calibrated == 0


def test_loaded_weights_bring_along_whether_they_were_calibrated():
    model, other = converted_tiny(), converted_tiny()
    cold = copy.deepcopy(other.state_dict())
    cs.calibrate(model, smooth(8, 3, 32, 32))
    other.load_state_dict(model.state_dict())
    assert cs.get_plan(other).calibrated == 8
    other.load_state_dict(cold)
    assert cs.get_plan(other).calibrated == 0
    with pytest.warns(cs.PlainWeightsWarning):
        model.load_state_dict(TinyNet().state_dict())
    assert cs.get_plan(model).calibrated == 0
    cs.calibrate(model, smooth(8, 3, 32, 32))


@pytest.mark.parametrize("way", ["load_checkpoint", "a folder"])
def test_weights_that_timm_loads_bring_it_along(tmp_path, way):
    model = cs.convert(timm.create_model("test_resnet"), input_size=32)
    cs.calibrate(model, smooth(8, 3, 32, 32))
    if way == "a folder":
        timm.models.save_for_hf(model, tmp_path, **cs.hub_arguments(model))
        other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    else:
        cs.save_converted(model, tmp_path / "weights.safetensors")
        other = cs.convert(timm.create_model("test_resnet"), input_size=32)
        timm.models.load_checkpoint(other, tmp_path / "weights.safetensors")
    assert cs.get_plan(other).calibrated == 8
    with pytest.raises(cs.CalibrationError, match="was calibrated on 8 images before"):
        cs.calibrate(other, smooth(8, 3, 32, 32))


def test_weights_that_bring_no_kernels_change_nothing_in_what_is_known():
    model = converted_tiny()
    cs.calibrate(model, smooth(8, 3, 32, 32))
    model.load_state_dict({"head.bias": torch.zeros(5)}, strict=False)
    assert cs.get_plan(model).calibrated == 8
    other = cs.convert(TinyNet(), "uniform", input_size=32)
    with pytest.raises(RuntimeError, match="dilations"):
        model.load_state_dict(other.state_dict())
    assert cs.get_plan(model).calibrated == 8
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert cs.get_plan(model).calibrated == 8


def test_a_state_that_a_training_has_kept_of_it_is_calibrated_still():
    model = converted_tiny()
    cs.calibrate(model, smooth(8, 3, 32, 32))
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.stem.weight.add_(1)
    model.load_state_dict(best)
    assert cs.get_plan(model).calibrated == 8
    plain = TinyNet().state_dict()
    with pytest.warns(cs.PlainWeightsWarning, match="plain convolutions"):
        model.load_state_dict(plain)
    assert cs.get_plan(model).calibrated == 0


def test_a_part_knows_what_was_done_to_the_whole():
    model = nn.Sequential(cs.convert(TinyNet().eval(), input_size=32))
    cs.calibrate(model, smooth(8, 3, 32, 32))
    assert cs.plan_of(model[0].state_dict()).calibrated == 8
    with pytest.raises(cs.CalibrationError, match="was calibrated on 8 images before"):
        cs.calibrate(model[0], smooth(8, 3, 32, 32))
    other = converted_tiny()
    other.load_state_dict(model[0].state_dict())
    assert cs.get_plan(other).calibrated == 8


def test_copies_and_pickles_know_it_too():
    model = cs.convert(timm.create_model("test_resnet").eval(), input_size=64)
    cold = copy.deepcopy(model.state_dict())
    cs.calibrate(model, smooth(8, 3, 64, 64))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert cs.get_plan(other).calibrated == 8
        other.load_state_dict(cold)
        assert cs.get_plan(other).calibrated == 0
    assert cs.get_plan(model).calibrated == 8


def test_kernels_are_not_solved_for_what_was_solved_before():
    model = converted_tiny()
    cs.calibrate(model, smooth(8, 3, 32, 32))
    with pytest.raises(cs.CalibrationError, match="was calibrated on 8 images before"):
        cs.calibrate(model, smooth(8, 3, 32, 32))


@pytest.mark.parametrize("change", [cs.revert, lambda net: cs.convert(net, "uniform", input_size=32)])
def test_other_levels_than_the_weights_were_calibrated_for_are_warned_of_and_not_calibrated_again(change):
    model = converted_tiny()
    cs.calibrate(model, smooth(8, 3, 32, 32))
    with pytest.warns(cs.CalibratedWeightsWarning, match="calibrated on 8 images"):
        change(model)
    assert cs.get_plan(model).stale
    with pytest.raises(cs.CalibrationError, match="was calibrated on 8 images before"):
        cs.convert(model, input_size=32, calibrate=smooth(8, 3, 32, 32))
    with pytest.raises(cs.CalibrationError, match="was calibrated on 8 images before"):
        cs.calibrate(model, smooth(8, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cs.CalibratedWeightsWarning)
        cs.revert(model)
    model.load_state_dict(TinyNet().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.convert(model, input_size=32, calibrate=smooth(8, 3, 32, 32))
    assert not cs.get_plan(model).stale


@pytest.mark.filterwarnings("ignore::coconv_surgery.CalibratedWeightsWarning")
def test_a_plan_says_where_levels_have_changed_since_the_calibration(tmp_path):
    model = cs.convert(TinyNet().eval(), include="stem", input_size=32)
    cs.calibrate(model, smooth(8, 3, 32, 32))
    calibrated = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="matches"):
        cs.convert(model, overrides={"nothing": 2}, input_size=32)
    assert not cs.get_plan(model).stale
    cs.convert(model, input_size=32)  # others beside the stem
    assert cs.get_plan(model).summary().endswith("calibrated on 8 images before levels changed")
    assert cs.plan_of(model.state_dict()).stale
    assert cs.Plan.from_json(cs.get_plan(model).to_json()).stale
    cs.save_converted(model, tmp_path / "net.safetensors")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    for file in ("net.safetensors", "net.pth"):
        loaded = cs.load_converted(TinyNet(), tmp_path / file)
        assert cs.get_plan(loaded).stale
        with pytest.raises(cs.CalibrationError, match="was calibrated on 8 images before"):
            cs.calibrate(loaded, smooth(8, 3, 32, 32))
    assert not cs.get_plan(cs.apply_plan(TinyNet(), cs.get_plan(model))).stale
    other = cs.convert(TinyNet(), include="stem", input_size=32)
    other.load_state_dict(calibrated)
    assert cs.get_plan(other).summary().endswith("calibrated on 8 images")


def test_a_report_prints_as_a_table_of_its_layers():
    report = cs.calibrate(converted_tiny(), smooth(8, 3, 32, 32))
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["conv", "error", "before"]
    assert lines[2].startswith(report.layers[0].name)
    assert lines[-1] == report.summary()


# What goes wrong.


def nan_in(model):
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = float("nan")
    return model


def huge(model):
    with torch.no_grad():
        model.stem.weight.fill_(1e38)
    return model


def calibrated(model):
    cs.calibrate(model, smooth(4, 3, 32, 32))
    return model


def made_in_inference_mode(model):
    with torch.inference_mode():
        model.stem.weight = nn.Parameter(model.stem.weight.clone())
    return model


GOOD = torch.randn(4, 3, 32, 32)
WRONG = {
    "no images": (lambda m: m, [], "there are no images"),
    "an empty tensor": (lambda m: m, torch.randn(0, 3, 32, 32), "there are no images"),
    "a function that runs something else": (lambda m: m, lambda net: None, "must call the network"),
    "NaN in an image": (lambda m: m, torch.full((4, 3, 32, 32), float("nan")), "batch 0 of the images holds"),
    "NaN in a weight": (nan_in, GOOD, "stem.weight holds numbers that are not finite"),
    "numbers too large": (huge, GOOD, "not finite"),
    "images much larger than planned": (lambda m: m, torch.randn(2, 3, 128, 128), "converted for maps of 16×16"),
    "images much smaller than planned": (lambda m: m, torch.randn(2, 3, 12, 12), "converted for maps of 16×16"),
    "images of other channels": (lambda m: m, torch.randn(2, 5, 32, 32), "does not run on these images"),
    "weights on the meta device": (lambda m: m.to("meta"), GOOD, "on the meta device"),
    "weights made in inference mode": (made_in_inference_mode, GOOD, "made in inference mode"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_clear_error_and_changes_nothing(what):
    spoil, images, message = WRONG[what]
    model = spoil(converted_tiny())
    before = weights(model)
    with pytest.raises(cs.CalibrationError, match=message):
        cs.calibrate(model, images)
    after = weights(model)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before if not before[n].is_meta)
    assert cs.get_plan(model).calibrated == 0


OTHERS = {
    "grey ones": (torch.randn(4, 1, 32, 32), "does not run on these images"),
    "one without a batch": (torch.randn(3, 32, 32), "does not run on these images"),
    "whole numbers": (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "does not run on these images"),
    "another name": ({"image": GOOD}, "does not run on these images"),
    "much larger ones": (torch.randn(2, 3, 128, 128), "converted for maps of 16×16"),
    "much smaller ones": (torch.randn(2, 3, 12, 12), "converted for maps of 16×16"),
    "a word": ("image", "holds no images, .* but str"),
    "None": (None, "holds no images, .* but NoneType"),
    "an array": (GOOD.numpy(), "holds no images, .* but ndarray"),
    "labels before images": ((torch.zeros(4), GOOD), r"holds no images, .* but a tensor \(4,\) of float32"),
    "sparse ones": (GOOD.to_sparse(), "torch.sparse_coo on cpu"),
    "ones on meta": (GOOD.to("meta"), "torch.strided on meta"),
    "NaN": (torch.full((4, 3, 32, 32), float("nan")), "not finite"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_batch_of_something_else_is_the_same_error_wherever_it_comes(what):
    other, message = OTHERS[what]
    for images in ([other], [GOOD, other], [other, GOOD]):
        with pytest.raises(cs.CalibrationError, match=message):
            cs.calibrate(converted_tiny(), images)


@pytest.mark.parametrize("what", ["an array", "labels before images"])
def test_a_stream_without_an_end_or_images_is_an_error(what):
    other, message = OTHERS[what]
    with pytest.raises(cs.CalibrationError, match=message):
        cs.calibrate(converted_tiny(), itertools.repeat(other))
    with pytest.raises(cs.CalibrationError, match="there are no images"):
        cs.calibrate(converted_tiny(), itertools.repeat(GOOD[:0]))


def test_empty_batches_are_left_out():
    images = list(smooth(32, 3, 32, 32).split(16))
    assert same_weights(calibrated_by([images[0], GOOD[:0], images[1], GOOD[:0]]), calibrated_by(images))


@pytest.mark.parametrize("images", ["a folder", None, 3, nn.Conv2d(3, 3, 3), {"x": 1}, io.StringIO()])
def test_what_cannot_be_images_is_refused_by_its_kind(images):
    with pytest.raises(TypeError, match="images must be"):
        cs.calibrate(converted_tiny(), images)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="also: no convolution matches 'nothing'"):
        cs.calibrate(converted_tiny(), GOOD, also="nothing")


def test_a_conversion_whose_calibration_fails_does_not_take_place():
    model = TinyNet()
    with pytest.raises(cs.CalibrationError):
        cs.convert(model, input_size=32, calibrate=[])
    assert not cs.get_plan(model).converted
    assert type(model.stem) is nn.Conv2d


def test_images_that_are_all_black_are_skipped_with_the_reason():
    model = image_net(nn.Conv2d(3, 8, 3, padding=1, bias=False))
    cs.convert(model, input_size=32)
    (row,) = cs.calibrate(model, torch.zeros(4, 3, 32, 32)).layers
    assert row.skipped == "its output is zero on these images"


def test_a_calibration_is_done_whole_or_not_at_all(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps the frames that a fault came through
    images = smooth(4, 3, 16, 16)

    def converted():
        torch.manual_seed(0)
        return cs.convert(TinyNet().eval(), input_size=16)

    def calibrate_unless_done(model):
        if not cs.get_plan(model).calibrated:
            cs.calibrate(model, images, positions=64)

    count = every_fault(converted, calibrate_unless_done, step=29)
    assert count > 50
    with capsys.disabled():
        print(f"\ncalibrate: {count} faults injected, none left a trace")
