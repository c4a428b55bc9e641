"""Where the dataflow is hidden it is followed all the same, or the convolution stays what it is."""

from collections import namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forwards import WAYS, Model
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

    return Model(forward, first=conv(3), second=conv(), predict=nn.Conv2d(16, 4, 1), norm=nn.BatchNorm2d(16))


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
    ],
    ids=["dataclass", "object", "slots", "named tuple", "nested", "dict", "iterator", "generator"],
)
def test_tensors_in_any_object_are_outputs(wrap, way):
    features = Model(lambda m, x: wrap(m.norm(m.last(m.first(x)))), first=conv(3), last=conv(), norm=nn.BatchNorm2d(16))
    assert reasons(features, way) == {"first": None, "last": None}
    side_output = Model(lambda m, x: (wrap(m.first(x)), m.last(m.first(x))), first=conv(3), last=conv())
    assert reasons(side_output, way) == {"first": Reason.PREDICTION, "last": Reason.PREDICTION}
