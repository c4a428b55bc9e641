"""Blocks that merge their branches for inference: the result is right, or the merge is refused."""

import asyncio
import contextlib
import copy
import functools
import itertools
import pickle
import threading
import types

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from faults import same_state, state
from sampling import few
from timm.utils.model import reparameterize_model
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights
from torch.utils._pytree import tree_leaves

import coconv_surgery as cs


@pytest.fixture(autouse=True)
def _no_grad():
    # Some networks cache what they compute, and torch copies no tensor that has a history.
    with torch.no_grad():
        yield


def lively(model):
    """Norms whose statistics make a mistake in merging show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    few(
        [
            *("repvgg_a0", "mobileone_s0", "repvit_m1", "repghostnet_050", "ghostnetv3_050"),
            *("levit_conv_128s", "efficientvit_m0", "tiny_vit_5m_224", "shvit_s1"),
        ],
        2,
    ),
)
def test_a_converted_network_computes_the_same_after_reparameterization(name):
    model = lively(timm.create_model(name))
    image = torch.randn(1, *model.pretrained_cfg["input_size"])
    cs.convert(model)
    contextual = len(cs.get_plan(model).converted)
    assert contextual
    expected = model(image)
    merged = reparameterize_model(model)
    assert cs.get_plan(merged).converted
    torch.testing.assert_close(merged(image), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)
    assert len(cs.get_plan(model).converted) == contextual, "the model itself is left as it was"


def test_a_plain_network_reparameterizes_as_before():
    model = lively(timm.create_model("repvgg_a0"))
    cs.revert(cs.convert(model))
    image = torch.randn(1, 3, 224, 224)
    merged = reparameterize_model(model)
    assert not cs.get_plan(merged).converted
    torch.testing.assert_close(merged(image), model(image), atol=1e-3, rtol=1e-3)


class Branches(nn.Module):
    """Two branches that merge into one convolution, in one way or another."""

    def __init__(self, way="new", second=None):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = second or nn.Conv2d(4, 4, 3, padding=1)
        self.way, self.merged = way, None

    def forward(self, x):
        return self.merged(x) if self.merged is not None else self.first(x) + self.second(x)

    def reparameterize(self):
        weight, bias = self.first.weight + self.second.weight, self.first.bias + self.second.bias
        merged = self.first if self.way == "in place" else nn.Conv2d(4, 4, 3, padding=1)
        merged.weight.data, merged.bias.data, self.merged = weight, bias, merged
        if self.way != "branches kept":
            del self.first, self.second


class Pooled(nn.Conv2d):
    """A branch that is no convolution, with the weights that stand for it."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.weight)
        self.weight[range(4), range(4)] = 1 / 9

    def forward(self, x):
        return F.avg_pool2d(x, 3, 1, 1)


class Pairs(nn.Module):
    """Convolutions in a row, each merged with the norm that follows it."""

    def __init__(self, channels=(4, 4, 4)):
        super().__init__()
        ends = list(itertools.pairwise(channels))
        self.convs = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) for inputs, outputs in ends)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _, outputs in ends)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x

    def fuse(self):
        for index in range(len(self.convs)):
            self.convs[index] = fuse_conv_bn_weights_into(self.convs[index], self.norms[index])
            self.norms[index] = nn.Identity()
        return self


def fuse_conv_bn_weights_into(conv, norm):
    merged = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    weights = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    merged.weight, merged.bias = fuse_conv_bn_weights(*weights)
    return merged


def test_branches_of_different_levels_are_refused_and_left_as_they_were():
    model = nn.Sequential(Branches(), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16), overrides={"0.second": (1, 3)})
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    with pytest.raises(ValueError, match="merged, this Branches would not compute the same"):
        reparameterize_model(model, inplace=True)
    assert torch.equal(model(image), expected)


def test_branches_of_one_plan_merge_with_their_levels():
    model = nn.Sequential(Branches(), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    reparameterize_model(model, inplace=True)
    assert model[0].merged.dilations == (1, 2, 3)
    torch.testing.assert_close(model(image), expected)


def test_a_large_kernel_that_holds_a_contextual_one_is_refused():
    model = cs.convert(timm.create_model("fastvit_t8"))
    before = copy.deepcopy(cs.get_plan(model))
    with pytest.raises(ValueError, match="merged, this ReparamLargeKernelConv would not compute the same"):
        reparameterize_model(model)
    assert cs.get_plan(model) == before


def test_a_fastvit_without_its_large_kernels_merges():
    model = lively(timm.create_model("fastvit_t8"))
    cs.convert(model, exclude=["*.small_conv"])
    image = torch.randn(1, 3, 256, 256)
    expected = model(image)
    merged = reparameterize_model(model)
    assert cs.get_plan(merged).converted
    torch.testing.assert_close(merged(image), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("way", ["in place", "branches kept"])
def test_a_merge_that_would_lose_levels_in_another_way_is_refused(way):
    model = nn.Sequential(Branches(way), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16), exclude=["0.second"])
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    with pytest.raises(ValueError, match="merged, this Branches would not compute the same"):
        reparameterize_model(model, inplace=True)
    assert torch.equal(model(image), expected)


def test_a_pool_that_is_folded_into_a_contextual_branch_is_refused():
    model = nn.Sequential(Branches(second=Pooled()), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16))
    with pytest.raises(ValueError, match="merged, this Branches would not compute the same"):
        reparameterize_model(model)


def test_branches_of_one_plan_may_merge_in_place():
    model = nn.Sequential(Branches("in place"), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(reparameterize_model(model)(image), model(image))


@pytest.mark.parametrize("second", [(1, 2, 3), (1, 3)], ids=["the same levels", "different levels"])
@pytest.mark.parametrize("channels", [(4, 4, 4), (3, 4, 4), (3, 4, 8, 4), (4, 8, 4)], ids=str)
def test_pairs_merged_in_one_call_keep_the_levels_of_each(channels, second):
    model = lively(nn.Sequential(Pairs(channels), nn.Conv2d(4, 2, 1)))
    cs.convert(model, input_size=(channels[0], 16, 16), overrides={"0.convs.1": second})
    levels = [conv.dilations for conv in model[0].convs]
    image = torch.randn(1, channels[0], 16, 16)
    merged = reparameterize_model(model)
    assert [conv.dilations for conv in merged[0].convs] == levels
    torch.testing.assert_close(merged(image), model(image))


# -- Nobody else's class changes ------------------------------------------------------------------------------------


class Block(nn.Module):
    """A convolution and its norm, merged by a method that takes arguments."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))

    def fuse(self, verbose=True, *, note=None):
        self.conv, self.norm = fuse_conv_bn_weights_into(self.conv, self.norm), nn.Identity()
        return verbose, note

    switch_to_deploy = merge_kernel = merge_bn = fuse


def around(block):
    return lively(nn.Sequential(block, nn.Conv2d(4, 2, 1)))


def test_a_conversion_changes_no_class_that_others_use():
    before, other = dict(vars(Block)), Block()
    model = cs.convert(around(Block()), input_size=(4, 16, 16))
    assert dict(vars(Block)) == before
    assert type(other) is Block
    assert isinstance(model[0], Block)
    assert (type(model[0]).__name__, type(model[0]).__module__) == ("Block", Block.__module__)
    assert other.fuse(False) == (False, None)


def test_reverting_gives_a_block_its_class_back():
    model = around(Block())
    cs.revert(cs.convert(model, input_size=(4, 16, 16)))
    assert [type(module) for module in model] == [Block, nn.Conv2d]
    cs.convert(model, input_size=(4, 16, 16))
    with pytest.warns(cs.NoChangeWarning):
        cs.apply_plan(model, cs.plan_conversion(model, input_size=(4, 16, 16), overrides={"*": None}))
    assert type(model[0]) is not Block
    cs.apply_plan(model, cs.plan_conversion(around(Block()), input_size=(4, 16, 16), overrides={"*": None}))
    assert type(model[0]) is Block


@pytest.mark.parametrize("name", ["fuse", "switch_to_deploy", "merge_kernel", "merge_bn"])
def test_a_merge_takes_any_arguments_and_returns_what_it_does(name):
    model = around(Block())
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    assert getattr(model[0], name)(False, note="mine") == (False, "mine")
    assert model[0].conv.dilations == (1, 2, 3)
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize(
    "ends",
    [
        lambda y: None,
        lambda y: (y, 3, None, True),
        lambda y: {"y": y, "n": 7},
        lambda y: [y.bool(), y],
        lambda y: torch.complex(y, y),
    ],
)
def test_a_block_may_return_anything(ends):
    class Ending(Block):
        def forward(self, x):
            return ends(super().forward(x))

    model = around(Ending())
    inputs = cs.Inputs((torch.randn(1, 4, 16, 16),), call=lambda model, x: model[1](model[0].norm(model[0].conv(x))))
    cs.convert(model, example_inputs=inputs)
    image = torch.randn(1, 4, 16, 16)
    expected = Block.forward(model[0], image)
    model[0].fuse()
    torch.testing.assert_close(Block.forward(model[0], image), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_block_of_any_type_merges(dtype):
    model = cs.convert(around(Block()), input_size=(4, 16, 16)).to(dtype)
    image = torch.randn(1, 4, 16, 16, dtype=dtype)
    expected = model(image)
    model[0].fuse()
    torch.testing.assert_close(model(image), expected, atol=0.05, rtol=0.05)


def test_a_block_that_holds_a_lock_merges():
    model = around(Block())
    model[0].lock = threading.Lock()
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    model[0].fuse()
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "closure"])
def test_a_merge_that_is_set_on_the_instance_keeps_levels(bound):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x))

    model = around(Bare())
    block = model[0]
    block.fuse = types.MethodType(Block.fuse, block) if bound else lambda: Block.fuse(block)
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    block.fuse()
    assert block.conv.dilations == (1, 2, 3)
    torch.testing.assert_close(model(image), expected)


def test_a_merge_that_would_lose_levels_is_undone_in_every_detail():
    model = nn.Sequential(Branches(), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16), overrides={"0.second": (1, 3)})
    before = state(model)
    with pytest.raises(ValueError, match="would not compute the same"):
        model[0].reparameterize()
    assert same_state(state(model), before)


def test_a_converted_block_copies_and_pickles():
    model = cs.convert(around(Block()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        again[0].fuse()
        assert again[0].conv.dilations == (1, 2, 3)
        torch.testing.assert_close(again(image), expected)


def test_methods_of_that_name_that_are_no_merges_go_on_as_before():
    class Other(nn.Module):
        fuse = False

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def reparameterize(self, x):
            return self.conv(x)

        @staticmethod
        def switch_to_deploy():
            return "static"

        def forward(self, x):
            return self.reparameterize(x)

    before = dict(vars(Other))
    model = cs.convert(nn.Sequential(Other(), nn.Conv2d(4, 2, 1)), input_size=(4, 16, 16))
    assert dict(vars(Other)) == before
    assert (model[0].fuse, model[0].switch_to_deploy()) == (False, "static")
    image = torch.randn(1, 4, 16, 16)
    assert torch.equal(model[0](image), model[0].conv(image))
    assert "conv2d" in torch.fx.symbolic_trace(model).code


def test_a_sampler_of_the_name_of_a_merge_compiles_as_before():
    class Sampler(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def reparameterize(self, mean, deviation):
            return mean + deviation

        def forward(self, x):
            return self.reparameterize(self.conv(x), x)

    model = cs.convert(nn.Sequential(Sampler(), nn.Conv2d(4, 2, 1)), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), model(image))


def test_a_block_that_can_merge_compiles_and_traces():
    model = cs.convert(around(Block()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), model(image))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(image), model(image))
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), model(image))


@pytest.mark.parametrize(
    "wrapped", [functools.partialmethod(Block.fuse, True), functools.lru_cache(Block.fuse)], ids=["partial", "cache"]
)
def test_a_merge_in_a_wrapping_keeps_levels(wrapped):
    cls = type("Wrapped", (Block,), {"fuse": wrapped})
    model = cs.convert(around(cls()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    model[0].fuse()
    assert model[0].conv.dilations == (1, 2, 3)
    torch.testing.assert_close(model(image), expected)


def test_a_merge_called_through_the_class_keeps_levels():
    model = cs.convert(around(Block()), input_size=(4, 16, 16))
    type(model[0]).fuse(model[0])
    assert model[0].conv.dilations == (1, 2, 3)
    assert model[0].fuse.__name__ == "fuse"


def test_a_tensor_among_the_options_of_a_merge_makes_no_difference():
    model = cs.convert(around(Block()), input_size=(4, 16, 16))
    model[0].fuse(torch.ones(1))
    assert model[0].conv.dilations == (1, 2, 3)


@pytest.mark.parametrize("wrap", [lambda conv: (conv, "x"), lambda conv: {"conv": conv}], ids=["tuple", "dict"])
def test_a_merge_that_returns_a_module_among_other_things_keeps_its_levels(wrap):
    class Returning(Block):
        def fuse(self):
            return wrap(fuse_conv_bn_weights_into(self.conv, self.norm))

    model = cs.convert(around(Returning()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    (conv,) = [leaf for leaf in tree_leaves(model[0].fuse()) if isinstance(leaf, nn.Module)]
    torch.testing.assert_close(conv(image), model[0](image))


def test_a_merge_by_helpers_that_take_modules_keeps_levels():
    class Helped(Pairs):
        def fuse_conv_bn(self, conv, norm):
            return fuse_conv_bn_weights_into(conv, norm)

        def fuse(self):
            for index in range(2):
                self.convs[index] = self.fuse_conv_bn(self.convs[index], self.norms[index])
                self.norms[index] = nn.Identity()

    model = cs.convert(around(Helped()), input_size=(4, 16, 16), overrides={"0.convs.1": (1, 3)})
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    model[0].fuse()
    assert [conv.dilations for conv in model[0].convs] == [(1, 2, 3), (1, 3)]
    torch.testing.assert_close(model(image), expected)


class Skipping(nn.Module):
    """Two inputs, and a pool that is folded into the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.pools = nn.Conv2d(4, 4, 3, padding=1), True

    def forward(self, x, skip):
        return self.conv(x) + skip + (F.avg_pool2d(x, 3, 1, 1) if self.pools else 0)

    def fuse(self):
        merged = nn.Conv2d(4, 4, 3, padding=1)
        weight = self.conv.weight.clone()
        weight[range(4), range(4)] += 1 / 9
        merged.weight.data, merged.bias.data, self.conv, self.pools = weight, self.conv.bias, merged, False


class Whole(nn.Module):
    """A network that merges its blocks, and that no small image runs through."""

    def __init__(self, block):
        super().__init__()
        self.block, self.head = block, nn.Linear(4 * 48 * 48, 2)

    def forward(self, x):
        return self.head((self.block(x, x) if isinstance(self.block, Skipping) else self.block(x)).flatten(1))

    def fuse(self):
        for module in self.children():
            if hasattr(module, "fuse"):
                module.fuse()


def test_a_block_of_two_inputs_is_compared():
    model = Whole(Skipping()).eval()
    cs.convert(model, input_size=(4, 48, 48))
    with pytest.raises(ValueError, match="would not compute the same"):
        model.block.fuse()


def test_every_block_of_a_network_that_merges_is_compared_by_itself():
    model = Whole(Skipping()).eval()
    cs.convert(model, input_size=(4, 48, 48))
    before = state(model)
    with pytest.raises(ValueError, match="would not compute the same"):
        model.fuse()
    assert same_state(state(model), before)
    model = lively(Whole(Pairs()))
    cs.convert(model, input_size=(4, 48, 48), overrides={"block.convs.1": (1, 3), "block.convs.0": 2})
    image = torch.randn(1, 4, 48, 48)
    expected = model(image)
    model.fuse()
    assert [conv.dilations for conv in model.block.convs] == [(1, 2), (1, 3)]
    torch.testing.assert_close(model(image), expected)


def test_outputs_that_are_not_numbers_are_compared_by_those_that_are():
    class Logarithm(Block):
        def forward(self, x):
            return super().forward(x).log()

    model = cs.convert(around(Logarithm()), input_size=(4, 16, 16))
    model[0].fuse()
    assert model[0].conv.dilations == (1, 2, 3)


def test_other_peoples_hooks_see_nothing_of_a_comparison():
    seen = []
    model = cs.convert(around(Block()), input_size=(4, 16, 16))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[0].fuse()
    assert seen == []


def test_reverting_a_merged_network_makes_all_of_it_plain():
    torch.manual_seed(0)
    model = lively(timm.create_model("repghostnet_050"))
    plain = reparameterize_model(model)
    cs.convert(model, "uniform(2)", input_size=64)
    merged = reparameterize_model(model)
    assert cs.get_plan(merged).converted
    cs.revert(merged)
    assert not cs.get_plan(merged).converted
    image = torch.randn(1, 3, 64, 64)
    expected = plain(image)
    torch.testing.assert_close(merged(image), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def test_a_merged_network_that_is_converted_further_still_reverts_to_a_plain_one():
    model = around(Block())
    cs.convert(model, input_size=(4, 16, 16))
    model[0].fuse()
    cs.convert(model, cs.UniformPolicy(2), input_size=(4, 16, 16))
    assert model[0].conv.dilations == (1, 2)
    cs.revert(model)
    assert type(model[0].conv) is nn.Conv2d


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("copied", [True, False])
def test_a_branch_that_a_merge_drops_is_not_compared(copied, kernel):
    class Auxiliary(Block):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(4, 3, kernel, padding=kernel // 2)

        def forward(self, x):
            y = super().forward(x)
            return y if self.head is None else (y, self.head(x))

        def fuse(self):
            merge = fuse_conv_bn_eval if copied else fuse_conv_bn_weights_into
            self.conv, self.norm, self.head = merge(self.conv, self.norm), nn.Identity(), None

    model = lively(nn.Sequential(Auxiliary()))
    model.mix = nn.Conv2d(4, 2, 1)
    inputs = cs.Inputs((torch.randn(1, 4, 16, 16),), call=lambda model, x: model.mix(model[0](x)[0]))
    cs.convert(model, example_inputs=inputs)
    image = torch.randn(1, 4, 16, 16)
    expected, _ = model[0](image)
    model[0].fuse()
    assert model[0].conv.dilations == (1, 2, 3)
    torch.testing.assert_close(model[0](image), expected)


def test_a_class_that_counts_its_subclasses_sees_none():
    seen = []

    class Registered(Block):
        def __init_subclass__(cls, *, tag, **kwargs):
            seen.append(tag)

    class Tagged(Registered, tag="a"):
        pass

    class TaggedConv(nn.Conv2d):
        def __init_subclass__(cls, *, tag, **kwargs):
            seen.append(tag)

    class OwnConv(TaggedConv, tag="b"):
        pass

    model = around(Tagged())
    model.append(OwnConv(2, 2, 3))
    cs.convert(model, input_size=(4, 16, 16), overrides={"2": 2})
    assert model[0].conv.dilations == (1, 2, 3)
    assert isinstance(model[2], cs.CoConv2d)
    assert seen == ["a", "b"]


class Reduced(Block):
    """Leaves a lock out when it is copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __reduce__(self):
        return Reduced, (), {name: value for name, value in vars(self).items() if name != "lock"}


class New(Block):
    """Takes an argument when it is made anew."""

    def __new__(cls, width):
        return super().__new__(cls)

    def __init__(self, width):
        super().__init__()

    def __getnewargs__(self):
        return (4,)


@pytest.mark.parametrize("build", [Reduced, lambda: New(4)], ids=["reduce", "newargs"])
def test_blocks_that_are_copied_in_a_way_of_their_own_still_are(build):
    model = cs.convert(around(build()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        assert torch.equal(again(image), model(image))
        again[0].fuse()
        assert again[0].conv.dilations == (1, 2, 3)


def test_a_submodule_that_has_the_name_of_a_merge_stays_one():
    class Fusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fuse = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.fuse(x)

    model = cs.convert(nn.Sequential(Fusing(), nn.Conv2d(4, 2, 1)), input_size=(4, 16, 16))
    assert type(model[0]) is Fusing
    assert isinstance(model[0].fuse, cs.CoConv2d)


# -- Blocks that cannot be run on any image -------------------------------------------------------------------------


class Sized(nn.Module):
    """A block that asks for images of one size."""

    def forward(self, x):
        assert x.shape[-1] == 16
        return super().forward(x)


class PooledBlock(nn.Module):
    """A convolution and a pool that its merging method folds into it, in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.pool, self.way = nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1), way

    def forward(self, x):
        return self.conv(x) + self.pool(x) if self.pool is not None else self.conv(x)

    def fuse(self):
        merged = self.conv if self.way == "in place" else nn.Conv2d(4, 4, 3, padding=1)
        merged.weight.data, merged.bias.data = self.conv.weight.clone(), self.conv.bias
        merged.weight[range(4), range(4)] += 1 / 9
        self.conv, self.pool = merged, None


@pytest.mark.parametrize("way", ["new", "in place"])
def test_a_pool_that_is_folded_in_is_seen_where_the_block_cannot_be_run(way):
    model = around(type("SizedPool", (Sized, PooledBlock), {})(way))
    cs.convert(model, input_size=(4, 16, 16))
    before = state(model)
    with pytest.raises(ValueError, match="merged, this SizedPool would not compute the same"):
        model[0].fuse()
    assert same_state(state(model), before)


@pytest.mark.parametrize("build", [Block, Pairs, Branches])
def test_a_block_that_cannot_be_run_merges_where_its_kernels_agree(build):
    plain = build()
    plain.__class__ = type("Sized", (Sized, type(plain)), {})
    model = cs.convert(around(plain), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    getattr(model[0], "fuse" if hasattr(plain, "fuse") else "reparameterize")()
    assert cs.get_plan(model).converted
    torch.testing.assert_close(model(image), expected)


# -- Merges that are not seen to ------------------------------------------------------------------------------------


def merge_into(block):
    block.conv, block.norm = fuse_conv_bn_weights_into(block.conv, block.norm), nn.Identity()


def in_steps(block):
    yield "merging"
    merge_into(block)


@contextlib.contextmanager
def merged_within(block):
    merge_into(block)
    yield


async def later(block):
    merge_into(block)


WAYS = {
    "class": (merge_into, lambda block: vars(type(block).__mro__[2])["fuse"](block)),
    "property": (property(lambda block: lambda: merge_into(block)), lambda block: block.fuse()),
    "cached": (functools.cached_property(merge_into), lambda block: block.fuse),
    "static": (staticmethod(merge_into), lambda block: block.fuse(block)),
    "classmethod": (classmethod(lambda cls, block: merge_into(block)), lambda block: block.fuse(block)),
    "needs": (lambda block, device, dtype: merge_into(block), lambda block: block.fuse("cpu", torch.float32)),
    "norm": (lambda block, norm: merge_into(block), lambda block: block.fuse(block.norm)),
    "named": (lambda block, *, norm: merge_into(block), lambda block: block.fuse(norm=block.norm)),
    "generator": (in_steps, lambda block: list(block.fuse())),
    "context": (merged_within, lambda block: block.fuse().__enter__()),
    "coroutine": (later, lambda block: asyncio.run(block.fuse())),
    "script": (merge_into, merge_into),
}


@pytest.mark.parametrize(("fuse", "call"), WAYS.values(), ids=WAYS)
def test_a_merge_in_another_way_than_by_calling_a_method_is_refused(fuse, call):
    model = around(type("Other", (Block,), {"fuse": fuse})())
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    with pytest.raises(ValueError, match=r"Other.conv would become a plain convolution where contextual ones are"):
        call(model[0])
    assert torch.equal(model(image), expected)


def test_a_plain_convolution_is_refused_wherever_a_block_holds_contextual_ones():
    model = cs.convert(around(Pairs()), input_size=(4, 16, 16))
    new = nn.Conv2d(4, 4, 3, padding=1)
    for put in (
        lambda: model[0].convs.__setitem__(0, new),
        lambda: model[0].convs.append(new),
        lambda: model[0].add_module(name="merged", module=new),
        lambda: setattr(model[0], "merged", nn.Sequential(new, nn.ReLU())),
    ):
        with pytest.raises(ValueError, match="would become a plain convolution where contextual ones are"):
            put()


def test_what_is_meant_to_be_plain_may_be_put_into_a_block():
    model = cs.convert(around(Pairs()), input_size=(4, 16, 16))
    block = model[0]
    block.mix, block.wider, block.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 9, 3), Pairs()
    cs.to_conv_(block.convs[0])
    block.convs[0] = nn.Conv2d(4, 4, 3, padding=1)
    block.convs[1] = cs.CoConv2d(4, 4, 3, padding=1, levels=2)
    cs.revert(model)
    block.convs[1] = nn.Conv2d(4, 4, 3, padding=1)
    assert (type(block), type(block.convs)) == (Pairs, nn.ModuleList)


@pytest.mark.xfail(torch.__version__.startswith("2.4."), reason="torch 2.4 compiles no __setattr__", strict=True)
def test_a_block_that_is_watched_compiles_where_its_forward_sets_attributes():
    class Counting(Pairs):
        def forward(self, x):
            self.seen = x.mean()
            return super().forward(x)

    model = cs.convert(around(Counting()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), model(image))


# -- Operations of the name of a merge ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [torch.add, lambda a, b: a + b, lambda *inputs: sum(inputs), functools.partial(torch.add, alpha=2)],
    ids=["torch", "lambda", "star", "partial"],
)
def test_an_operation_of_the_name_of_a_merge_stays_one(operation):
    class Joining(Branches):
        def __init__(self):
            super().__init__()
            self.fuse = operation

        def forward(self, x):
            return self.fuse(self.first(x), self.second(x))

    model = cs.convert(around(Joining()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model[1](operation(model[0].first(image), model[0].second(image)))
    assert torch.equal(model(image), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(image), expected)
    model[0].reparameterize()
    assert model[0].merged.dilations == (1, 2, 3)
    assert cs.revert(model)[0].fuse is operation


def test_a_forward_that_asks_a_merging_method_for_its_kernel_traces():
    class Asking(Block):
        def rep_params(self):
            return self.norm.weight, None

        def forward(self, x):
            return self.norm(self.conv(x)) + self.rep_params()[0].sum()

    model = cs.convert(around(Asking()), input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(image), model(image))


def test_a_network_on_the_meta_device_merges():
    with torch.device("meta"):
        model = cs.convert(timm.create_model("repvgg_a0").eval())
        assert len(cs.get_plan(reparameterize_model(model)).converted) == 21
