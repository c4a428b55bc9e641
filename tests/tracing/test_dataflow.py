"""Where the dataflow is hidden it is followed all the same, or the convolution stays what it is."""

from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from forwards import WAYS, Model, fails_on_torch_2_4
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DeformConv2d

import coconv_surgery as cs
from coconv_surgery.planning.reasons import Reason


def conv(inputs=16, outputs=16, **arguments):
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **arguments})


def reasons(model, way="shapes"):
    """Reasons by name, None for what is converted; 1×1 convolutions left aside."""
    rows = cs.plan_conversion(model, **WAYS[way]).rows
    return {row.name: row.reason_key for row in rows if row.reason_key is not Reason.KERNEL}


# -- Gradients switched off ---------------------------------------------------------------------------------------


def under_no_grad(model, x):
    with torch.no_grad():
        return model.predict(model.first(x))


def under_inference_mode(model, x):
    with torch.inference_mode():
        return model.predict(model.first(x))


def between_switches(model, x):
    torch.set_grad_enabled(False)
    output = model.predict(model.first(x))
    torch.set_grad_enabled(True)
    return output


def under_a_switch(model, x):
    with torch.set_grad_enabled(not torch.is_tensor(x)):
        return model.predict(model.first(x))


@torch.no_grad()
def decorated_with_no_grad(model, x):
    return model.predict(model.first(x))


@torch.inference_mode()
def decorated_with_inference_mode(model, x):
    return model.predict(model.first(x))


def in_a_reentrant_checkpoint(model, x):
    return checkpoint(lambda x: model.predict(model.first(x).relu()), x, use_reentrant=True)


def in_a_checkpoint(model, x):
    return checkpoint(lambda x: model.predict(model.first(x).relu()), x, use_reentrant=False)


def in_two_checkpoints(model, x):
    x = checkpoint(model.first, x, use_reentrant=True)
    return checkpoint(lambda x: (x, model.predict(x)), x.relu(), use_reentrant=True)[1]


def in_nested_checkpoints(model, x):
    inner = lambda x: checkpoint(model.first, x, use_reentrant=True).relu()  # noqa: E731
    return checkpoint(lambda x: model.predict(inner(x)), x, use_reentrant=True)


def in_a_checkpoint_under_inference_mode(model, x):
    with torch.inference_mode():
        x = checkpoint(lambda x: model.first(x).relu(), x, use_reentrant=True)
    return model.predict(x.clone())


def through_detached_maps(model, x):
    return model.predict(model.first(x).detach()).detach()


def through_data(model, x):
    return model.predict(model.first(x).data).data


class Remembering(torch.autograd.Function):
    """A checkpoint by another name."""

    @staticmethod
    def forward(ctx, x, run):
        with torch.no_grad():
            return run(x)


def in_a_function_of_its_own(model, x):
    return Remembering.apply(x, lambda x: model.predict(model.first(x).relu()))


HIDDEN = [
    *(under_no_grad, under_inference_mode, between_switches, under_a_switch),
    *(decorated_with_no_grad, decorated_with_inference_mode),
    *(in_a_reentrant_checkpoint, in_a_checkpoint, in_two_checkpoints, in_nested_checkpoints),
    *(in_a_checkpoint_under_inference_mode, through_detached_maps, through_data, in_a_function_of_its_own),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forward", HIDDEN, ids=lambda forward: forward.__name__)
def test_a_prediction_layer_is_one_although_gradients_are_off(forward, way):
    model = Model(forward, first=conv(3), predict=conv())
    assert reasons(model, way) == {"first": None, "predict": Reason.PREDICTION}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forward", HIDDEN, ids=lambda forward: forward.__name__)
def test_offsets_are_offsets_although_gradients_are_off(forward, way):
    class Steered(nn.Module):
        def __init__(self):
            super().__init__()
            self.offsets, self.sample = conv(16, 18), DeformConv2d(16, 4, 3, padding=1)

        def forward(self, x):
            return self.sample(x, self.offsets(x))

    found = reasons(Model(forward, first=conv(3), predict=Steered()), way)
    assert found["predict.offsets"] is Reason.READ_BY_POSITION


def test_what_a_network_can_do_only_without_gradients_works():
    def forward(model, x):
        with torch.no_grad():
            model.mix.weight.mul_(len(model.mix.bias.numpy()))
        return model.mix(model.first(x))

    assert reasons(Model(forward, first=conv(3), mix=nn.Conv2d(16, 4, 1)), "numbers") == {"first": None}


def test_what_hides_its_dataflow_for_good_is_left_alone():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, model):
            return model.second(model.first(x)).relu()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    model = Model(lambda m, x: m.mix(Opaque.apply(x, m)), first=conv(3), second=conv(), mix=nn.Conv2d(16, 4, 1))
    assert reasons(model) == {"first": Reason.DATAFLOW_UNKNOWN, "second": Reason.DATAFLOW_UNKNOWN}
    plan = cs.plan_conversion(model, input_size=32, overrides={"first": 2})
    assert [row.name for row in plan.converted] == ["first"], "who knows better may say so"


# -- Side outputs -------------------------------------------------------------------------------------------------


def side(output):
    """A network whose first convolution's output goes on and, in some form, comes out."""

    def forward(model, x):
        features = model.first(x)
        return model.predict(model.second(features).relu()), output(model, features)

    model = Model(forward, first=conv(3), second=conv(), predict=nn.Conv2d(16, 4, 1), norm=nn.BatchNorm2d(16))
    model.register_buffer("kept", torch.zeros(1, 16, 32, 32))
    return model


@pytest.mark.parametrize(
    "output",
    [
        lambda model, features: features,
        lambda model, features: features.sigmoid(),
        lambda model, features: F.interpolate(features, scale_factor=2),
        lambda model, features: features.permute(0, 2, 3, 1).flatten(1, 2).tanh() * 10,
        lambda model, features: {"maps": [features + 1]},
        lambda model, features: features.clamp(-1, 1),
        lambda model, features: {"maps": features}.values(),
        lambda model, features: MappingProxyType({"maps": features}),
    ],
    ids=["raw", "sigmoid", "resized", "flattened", "in a container", "clamped", "in a view", "in a proxy"],
)
def test_what_a_network_returns_as_it_is_is_a_prediction_although_a_layer_reads_it(output):
    assert reasons(side(output)) == {"first": Reason.SIDE_OUTPUT, "second": None}


@pytest.mark.parametrize(
    "output",
    [
        lambda model, features: features.relu(),
        lambda model, features: model.norm(features),
        lambda model, features: F.group_norm(features, 4),
        lambda model, features: F.gelu(features),
        lambda model, features: features.square().mean(),
    ],
    ids=["relu", "norm", "norm without parameters", "gelu", "a number"],
)
def test_features_that_a_network_returns_are_no_predictions(output):
    assert reasons(side(output)) == {"first": None, "second": None}


def test_a_coarse_flow_field_is_a_prediction():
    def forward(model, x):
        flow = model.flow(x)
        return flow, flow + model.refine(model.second(torch.cat([x, flow], 1)))

    model = Model(forward, flow=conv(3, 2), second=conv(5), refine=conv(16, 2))
    assert reasons(model) == {"flow": Reason.SIDE_OUTPUT, "second": None, "refine": Reason.PREDICTION}


# -- Outputs that leave otherwise than by being returned ----------------------------------------------------------


WAYS_OUT = {
    "attribute": lambda model, y: setattr(model, "aux", y),
    "container in an attribute": lambda model, y: setattr(model, "aux", {"maps": [y.detach()]}),
    "detached in place": lambda model, y: y.clone().detach_(),
    "classes": lambda model, y: y.argmax(1),
    "indices": lambda model, y: y.topk(3, 1).indices,
    "comparison": lambda model, y: y > 0,
    "whole numbers": lambda model, y: y.to(torch.uint8),
    "new tensor": lambda model, y: y.new_tensor(y),
    "written into whole numbers": lambda model, y: torch.zeros(1, 16, 32, 32, dtype=torch.uint8).copy_(y),
    "one axis": lambda model, y: y.flatten(),
    "closure": lambda model, y: lambda: y,
    "generator within a tuple": lambda model, y: (part for part in [y]),
    "map within a tuple": lambda model, y: map(torch.sigmoid, [y]),
    "zip within a tuple": lambda model, y: zip([y], "a", strict=True),
    "softplus": lambda model, y: F.softplus(y),
    "written into the data of a buffer": lambda model, y: (model.kept.data.copy_(y), None)[1],
    "rows written into the data of a buffer": lambda model, y: model.kept.data.__setitem__(0, y.data[0]),
    "written into a detached buffer": lambda model, y: (model.kept.detach().copy_(y), None)[1],
    "data of a buffer": lambda model, y: setattr(model.kept, "data", y.detach()),
}


@pytest.mark.parametrize("leave", WAYS_OUT.values(), ids=WAYS_OUT)
def test_an_output_that_leaves_as_it_is_is_a_prediction_although_a_layer_reads_it(leave):
    assert reasons(side(leave)) == {"first": Reason.SIDE_OUTPUT, "second": None}


@pytest.mark.parametrize("leave", [lambda model, y: y.detach().numpy(), lambda model, y: y.tolist()])
def test_numbers_that_leave_torch_are_an_output(leave):
    assert reasons(side(leave), "numbers") == {"first": Reason.SIDE_OUTPUT, "second": None}


@pytest.mark.parametrize(
    ("given", "take"),
    [
        ([], lambda given, y: given.append(y)),
        ({}, lambda given, y: given.update(y=y)),
        (torch.zeros(1, 16, 32, 32), lambda given, y: given.copy_(y)),
    ],
    ids=["list", "dict", "tensor"],
)
def test_what_is_put_into_an_argument_is_an_output(given, take):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.predict = conv(3), conv(), nn.Conv2d(16, 4, 1)

        def forward(self, x, given):
            y = self.first(x)
            take(given, y)
            return self.predict(self.second(y).relu())

    rows = cs.plan_conversion(Net(), example_inputs=(torch.ones(1, 3, 32, 32), given)).rows
    assert [row.reason_key for row in rows[:2]] == [Reason.SIDE_OUTPUT, None]


@pytest.mark.parametrize(
    "keep",
    [
        lambda model, y: y.relu(),
        lambda model, y: model.norm(y),
        lambda model, y: y * y.sigmoid(),
        lambda model, y: y.square().mean(),
        lambda model, y: torch.zeros_like(y),
        lambda model, y: torch.arange(32).type_as(y),
        lambda model, y: y.new_ones(3, 3) > 0,
        lambda model, y: torch.tensor(y.shape),
        lambda model, y: 0.9 * y.mean((0, 2, 3)) + 0.1 * y.amax((0, 2, 3)),
        lambda model, y: (y.flatten(2).transpose(1, 2) @ y.flatten(2)).softmax(-1),
    ],
    ids=[
        "relu",
        "norm",
        "gated by itself",
        "number",
        "shape",
        "type",
        "made like it",
        "size",
        "statistic",
        "attention map",
    ],
)
def test_features_and_caches_that_a_network_keeps_are_no_predictions(keep):
    assert reasons(side(lambda model, y: setattr(model, "kept", keep(model, y)))) == {"first": None, "second": None}


def test_what_somebodys_hook_takes_is_no_output():
    model, seen = side(lambda model, y: None), []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    assert reasons(model) == {"first": None, "second": None}


# -- Objects as outputs -------------------------------------------------------------------------------------------


@dataclass
class Record:
    maps: object


class Plain:
    def __init__(self, maps):
        self._maps = {"deep": [maps]}


class Slotted:
    __slots__ = ("maps",)

    def __init__(self, maps):
        self.maps = maps


class Mapping(dict):
    """A dict that hides what it holds from those who ask it."""

    def values(self):
        return []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "wrap",
    [
        *(Record, Plain, Slotted, namedtuple("Named", "maps"), lambda maps: Record(Record((maps,)))),
        *(lambda maps: Mapping(maps=maps), lambda maps: iter([maps]), lambda maps: (part for part in [maps])),
        *(lambda maps: {maps: "maps"}, lambda maps: slice(None, maps), ValueError),
    ],
    ids=[
        *("dataclass", "object", "slots", "named tuple", "nested", "dict", "iterator", "generator"),
        *("key", "slice", "exception"),
    ],
)
def test_tensors_in_any_object_are_outputs(wrap, way):
    features = Model(lambda m, x: wrap(m.norm(m.last(m.first(x)))), first=conv(3), last=conv(), norm=nn.BatchNorm2d(16))
    assert reasons(features, way) == {"first": None, "last": None}
    side_output = Model(lambda m, x: (wrap(m.first(x)), m.last(m.first(x))), first=conv(3), last=conv())
    assert reasons(side_output, way) == {"first": Reason.PREDICTION, "last": Reason.PREDICTION}


# -- Kernels, offsets and boxes that a convolution makes ----------------------------------------------------------


def boxes(operation):
    def forward(model, x):
        corners = torch.cat([torch.zeros(1, 1), model.make(model.first(x)).mean((2, 3)) * 8], 1)
        return model.mix(operation(model.first(x), corners, (4, 4)))

    return forward, 4


def involution(model, x):
    y = model.first(x)
    return model.mix((F.unfold(y, 3, padding=1).view(1, 16, 9, 32, 32) * model.make(y).unsqueeze(1)).sum(2))


def involution_by_einsum(model, x):
    y = model.first(x)
    patches = F.unfold(y, 3, padding=1).view(1, 16, 9, 1024)
    return model.mix(torch.einsum("bckn,bkn->bcn", patches, model.make(y).flatten(2)).view(1, 16, 32, 32))


def involution_by_windows(model, x):
    y = model.first(x)
    patches = F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    kernel = model.make(y).permute(0, 2, 3, 1).reshape(1, 1, 32, 32, 3, 3)
    return model.mix((patches * kernel).sum((-1, -2)))


def involution_by_crops(model, x):
    y = model.first(x)
    padded, kernel = F.pad(y, (1, 1, 1, 1)), model.make(y)
    crops = [padded[:, :, i : i + 32, j : j + 32] for i in range(3) for j in range(3)]
    return model.mix(sum(crop * kernel[:, i : i + 1] for i, crop in enumerate(crops)))


def involution_by_rolling(model, x):
    y = model.first(x)
    kernel = model.make(y)
    rolled = [torch.roll(y, (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return model.mix(sum(copy * kernel[:, i : i + 1] for i, copy in enumerate(rolled)))


def involution_by_padding(model, x):
    y = model.first(x)
    kernel, places = model.make(y), [(i, j) for i in range(3) for j in range(3)]
    crops = [F.pad(y, (1, 1, 1, 1))[:, :, i : i + 32, j : j + 32] for i, j in places]
    return model.mix(sum(crop * kernel[:, n : n + 1] for n, crop in enumerate(crops)))


def involution_by_negative_padding(model, x):
    y = model.first(x)
    kernel, places = model.make(y), [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    copies = [F.pad(y, (i, -i, j, -j)) for i, j in places]
    return model.mix(sum(copy * kernel[:, n : n + 1] for n, copy in enumerate(copies)))


def in_steps(patches, rows, columns):
    return ((patches * rows[:, None, :, None]).sum(2) * columns[:, None]).sum(2)


def by_einsum(patches, rows, columns):
    return torch.einsum("bcijhw,bihw,bjhw->bchw", patches, rows, columns)


def by_products(patches, rows, columns):
    patches, rows, columns = (tensor.movedim((-2, -1), (1, 2)) for tensor in (patches, rows, columns))
    along_rows = (patches.transpose(-1, -2) @ rows[..., None, :, None]).squeeze(-1)
    return (along_rows @ columns[..., None]).squeeze(-1).movedim(-1, 1)


def unfolded(y):
    return F.unfold(y, 3, padding=1).view(1, 16, 3, 3, 32, 32)


def windows(y):
    return F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).movedim((4, 5), (2, 3))


def crops(y):
    padded = F.pad(y, (1, 1, 1, 1))
    copies = [padded[:, :, i : i + 32, j : j + 32] for i in range(3) for j in range(3)]
    return torch.stack(copies, 2).unflatten(2, (3, 3))


@pytest.mark.parametrize("patches", [unfolded, windows, crops])
@pytest.mark.parametrize("apply", [in_steps, by_einsum, by_products])
def test_each_of_two_kernels_for_rows_and_columns_is_read_by_position(apply, patches):
    def forward(model, x):
        y = model.first(x)
        return model.mix(model.behind(apply(patches(y), model.rows(y), model.columns(y))).relu())

    parts = {"first": conv(3), "rows": conv(16, 3), "columns": conv(16, 3), "behind": conv()}
    by_position = dict.fromkeys(("rows", "columns"), Reason.READ_BY_POSITION)
    found = reasons(Model(forward, **parts, mix=nn.Conv2d(16, 4, 1)))
    assert found == {"first": None, **by_position, "behind": None}


def carafe(model, x):
    y = model.first(x)
    kernel = F.pixel_shuffle(model.make(y), 2).softmax(1).unsqueeze(1)
    patches = F.interpolate(F.unfold(y, 3, padding=1).view(1, 144, 32, 32), scale_factor=2)
    return model.mix((patches.view(1, 16, 9, 64, 64) * kernel).sum(2))


def matrix_product(model, x):
    y = model.first(x)
    return model.mix((model.make(y).mean((2, 3)).view(16, 16) @ y.flatten(2)[0]).view(1, 16, 32, 32))


def warp_by_gathering(model, x):
    y = model.first(x)
    positions = model.make(y)[:, :1] + torch.arange(32.0).view(1, 1, 1, 32)
    before = positions.detach().floor()
    weight = positions - before

    def at(places):
        return y.gather(3, places.long().clamp(0, 31).expand(1, 16, 32, 32))

    return model.mix(at(before) * (1 - weight) + at(before + 1) * weight)


def flow_that_is_context_as_well(model, x):
    y = model.first(x)
    flow = model.make(y)
    return model.mix(F.grid_sample(y, flow[:, :2].permute(0, 2, 3, 1)) + flow[:, 2:])


def squashed_flow_that_is_context_as_well(model, x):
    y = model.first(x)
    flow = F.hardtanh(model.make(y))
    return model.mix(F.grid_sample(y, flow[:, :2].permute(0, 2, 3, 1)) + flow)


def volume(model, x):
    y = model.first(x)
    return model.mix(F.grid_sample(y[:, :, None], model.make(y).permute(0, 2, 3, 1)[:, None])[:, :, 0])


MADE = {
    "RoI align": boxes(torchvision.ops.roi_align),
    "RoI pool": boxes(torchvision.ops.roi_pool),
    "position-sensitive RoI align": boxes(lambda *args: torchvision.ops.ps_roi_align(*args).repeat(1, 16, 1, 1)),
    "position-sensitive RoI pool": boxes(lambda *args: torchvision.ops.ps_roi_pool(*args).repeat(1, 16, 1, 1)),
    "involution": (involution, 9),
    "involution by einsum": (involution_by_einsum, 9),
    "involution by windows": (involution_by_windows, 9),
    "involution by crops": (involution_by_crops, 9),
    "involution by rolling": (involution_by_rolling, 9),
    "involution by padding": (involution_by_padding, 9),
    "involution by negative padding": (involution_by_negative_padding, 9),
    "CARAFE": (carafe, 36),
    "matrix product": (matrix_product, 256),
    "warp by gathering": (warp_by_gathering, 2),
    "flow that is context as well": (flow_that_is_context_as_well, 18),
    "squashed flow that is context as well": (squashed_flow_that_is_context_as_well, 16),
    "volume": (volume, 3),
}


@pytest.mark.parametrize(("forward", "channels"), MADE.values(), ids=MADE)
def test_what_a_convolution_makes_to_steer_another_operation_is_read_by_position(forward, channels):
    model = Model(forward, first=conv(3), make=conv(16, channels), mix=nn.Conv2d(16, 4, 1))
    assert reasons(model) == {"first": None, "make": Reason.READ_BY_POSITION}


def test_offsets_and_mask_of_a_deformable_convolution_by_hand_are_left_alone():
    def forward(model, x):
        offsets, mask = model.offsets(x), model.mask(x).sigmoid()
        positions = offsets + torch.arange(32.0).view(1, 1, 1, 32)
        places = positions.detach().floor().long().clamp(0, 31)
        taken = torch.stack([x.gather(3, places[:, n : n + 1].expand(1, 3, 32, 32)) for n in range(9)], -1)
        taken = taken * (mask * (positions - positions.detach().floor())).permute(0, 2, 3, 1)[:, None]
        taken = taken.view(1, 3, 32, 32, 3, 3).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 96, 96)
        return model.mix(model.sample(taken))

    parts = {"offsets": conv(3, 9), "mask": conv(3, 9), "sample": nn.Conv2d(3, 16, 3, stride=3)}
    found = reasons(Model(forward, **parts, mix=nn.Conv2d(16, 4, 1)))
    assert found == {"offsets": Reason.READ_BY_POSITION, "mask": Reason.READ_BY_POSITION, "sample": None}


def gate(model, x):
    y = model.first(x)
    return model.mix(y * model.make(y).sigmoid())


def gate_of_an_average_of_patches(model, x):
    y = model.first(x)
    average = F.unfold(y, 3, padding=1).view(1, 16, 9, 32, 32).mean(2)
    return model.mix(average * model.make(y).sigmoid())


def pooled_gate(model, x):
    y = model.first(x)
    return model.mix(y * model.make(y).mean((2, 3), keepdim=True).sigmoid())


def gate_by_einsum(model, x):
    y = model.first(x)
    return model.mix(torch.einsum("bchw,bc->bchw", y, model.make(y).mean((2, 3)).sigmoid()))


def attention(model, x):
    y = model.first(x)
    query, key = model.make(y).flatten(2), y.flatten(2)
    return model.mix((key @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)).view(1, 16, 32, 32))


def attention_with_pooled_queries(model, x):
    y = model.first(x)
    query, key = F.adaptive_avg_pool2d(model.make(y), 4).flatten(2), y.flatten(2)
    return model.mix((key @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)).view(1, 16, 4, 4))


def linear_attention(model, x):
    query = model.first(x).flatten(2)
    key = model.make(model.first(x)).flatten(2).exp()
    total = query.transpose(1, 2) @ key.sum(-1, keepdim=True)
    return model.mix(((query @ key.transpose(1, 2)) @ query / total.transpose(1, 2)).view(1, 16, 32, 32))


def attention_to_neighbours(model, x):
    y = model.first(x)
    patches = F.unfold(y, 3, padding=1).view(1, 16, 9, 32, 32)
    weights = (model.make(y).unsqueeze(2) * patches).sum(1, keepdim=True).softmax(2)
    return model.mix((weights * patches).sum(2))


def selection_of_branches(model, x):
    y = model.first(x)
    weights = model.make(y).mean((2, 3)).view(1, 2, 8, 1, 1).softmax(1)
    return model.mix((torch.stack([y[:, :8], y[:, 8:]], 1) * weights).sum(1).repeat(1, 2, 1, 1))


def relu_by_hand(model, x):
    y = model.make(model.first(x))
    y[y < 0] = 0
    return model.mix(y)


def unpooling(model, x):
    y, places = F.max_pool2d(model.make(model.first(x)).relu(), 2, return_indices=True)
    return model.mix(F.max_unpool2d(y, places, 2))


NO_SHAPES = fails_on_torch_2_4("keeps no shapes in its record: an average of patches counts as patches")
GATES = [
    pytest.param(gate_of_an_average_of_patches, marks=NO_SHAPES),
    *(gate, pooled_gate, gate_by_einsum, relu_by_hand, unpooling),
    *(attention, attention_with_pooled_queries, linear_attention, attention_to_neighbours, selection_of_branches),
]


@pytest.mark.parametrize("forward", GATES, ids=lambda forward: forward.__name__)
def test_gates_and_attention_are_no_kernels(forward):
    model = Model(forward, first=conv(3), make=conv(), mix=nn.Conv2d(16, 4, 1))
    assert reasons(model) == {"first": None, "make": None}


# -- Numbers of its own for each channel --------------------------------------------------------------------------


def learned(*shape):
    return nn.Parameter(torch.ones(*shape))


@pytest.mark.parametrize(
    "scale",
    [
        lambda y, w: y * w,
        lambda y, w: y + w,
        lambda y, w: y / w.exp() - w,
        lambda y, w: y.mul_(w).add_(w),
        lambda y, w: torch.addcmul(w, y, w),
        lambda y, w: torch.lerp(y, w, 0.5),
        lambda y, w: torch.maximum(y, w),
        lambda y, w: (y.permute(0, 2, 3, 1) * w.flatten()).sigmoid(),
        lambda y, w: F.prelu(y, w.flatten()),
        lambda y, w: torch.cat([y, w.expand_as(y)], 1),
    ],
)
def test_a_learned_number_for_each_channel_makes_no_features_of_a_prediction(scale):
    model = Model(lambda m, x: scale(m.predict(m.first(x).relu()), m.factor), first=conv(3), predict=conv())
    model.factor = learned(16, 1, 1)
    assert reasons(model) == {"first": None, "predict": Reason.PREDICTION}


def test_a_map_of_priors_makes_no_features_of_a_prediction():
    model = Model(lambda m, x: m.predict(x) + m.anchors, predict=conv(3))
    model.anchors = learned(1, 1, 32, 32)
    assert reasons(model) == {"predict": Reason.PREDICTION}


def test_implicit_knowledge_makes_no_features_of_a_prediction():
    model = Model(lambda m, x: m.factor * m.predict(m.shift + x), predict=conv(3))
    model.shift, model.factor = learned(1, 3, 1, 1), learned(1, 16, 1, 1)
    assert reasons(model) == {"predict": Reason.PREDICTION}


def test_a_side_output_with_a_learned_factor_is_one():
    model = side(lambda model, features: features * model.factor)
    model.factor = learned(16, 1, 1)
    assert reasons(model) == {"first": Reason.SIDE_OUTPUT, "second": None}


class Norm(nn.Module):
    """Layer normalisation by hand."""

    def __init__(self, way):
        super().__init__()
        self.weight, self.bias, self._way = learned(16, 1, 1), learned(16, 1, 1), way

    def forward(self, x):
        return self._way(x) * self.weight + self.bias


def by_division(x):
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()


def by_multiplication(x):
    return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("way", [by_division, by_multiplication])
def test_a_norm_by_hand_makes_features(way):
    model = Model(lambda m, x: m.norm(m.last(m.first(x))), first=conv(3), last=conv(), norm=Norm(way))
    assert reasons(model) == {"first": None, "last": None}
    model = side(lambda model, features: model.by_hand(features))
    model.by_hand = Norm(way)
    assert reasons(model) == {"first": None, "second": None}


@pytest.mark.parametrize(
    "finish",
    [
        lambda m, x: m.mix(x + m.factor * m.last(x)),
        lambda m, x: m.last(x).relu() * m.factor,
        lambda m, x: (m.last(x).unsqueeze(1) * m.rows).sum(2),
        lambda m, x: torch.einsum("bchw,oc->bohw", m.last(x), m.rows[0, :, :, 0, 0]),
    ],
    ids=["layer scale", "activated", "1×1 by hand", "1×1 by einsum"],
)
def test_learned_numbers_behind_features_or_a_sum_are_a_layer(finish):
    model = Model(lambda m, x: finish(m, m.first(x).relu()), first=conv(3), last=conv(), mix=nn.Conv2d(16, 4, 1))
    model.factor, model.rows = learned(16, 1, 1), learned(1, 4, 16, 1, 1)
    assert reasons(model) == {"first": None, "last": None}


def test_a_residual_map_with_layer_scale_that_a_network_returns_is_no_prediction():
    def forward(model, x):
        features = model.first(x).relu()
        features = features + model.factor * model.last(features)
        return features, model.mix(features)

    model = Model(forward, first=conv(3), last=conv(), mix=nn.Conv2d(16, 4, 1))
    model.factor = learned(16, 1, 1)
    assert reasons(model) == {"first": None, "last": None}


def test_convolutions_of_one_dilation_that_are_concatenated_are_converted():
    network = Model(
        lambda self, x: self.mix(torch.cat([self.a(x), self.b(x)], 1)),
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(3, 8, 3, padding=1),
        mix=nn.Conv2d(16, 4, 1),
    )
    assert [row.name for row in cs.plan_conversion(network, input_size=32).converted] == ["a", "b"]


def test_what_other_threads_compute_is_not_known():
    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            return self.mix(pool.submit(lambda: self.conv(F.pad(x, (1, 1, 2, 0)))).result().relu())

    network = Model(forward, conv=nn.Conv2d(3, 16, 3), mix=nn.Conv2d(16, 4, 1))
    assert cs.plan_conversion(network, input_size=32).rows[0].reason_key is Reason.DATAFLOW_UNKNOWN
