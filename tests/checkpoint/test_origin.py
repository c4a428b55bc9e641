"""What a file or a state dict says of how its network was converted."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import coconv_surgery as cs


@pytest.fixture
def converted(net):
    return cs.convert(net, input_size=32)


def test_a_state_dict_tells_the_plan(converted):
    assert cs.plan_of(converted.state_dict()) == cs.get_plan(converted)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {}},
        lambda state: {"state_dict_ema": state},
        lambda state: {"module": state},
    ],
    ids=["bare", "state_dict", "model", "ema", "module"],
)
def test_a_torch_file_tells_the_plan(converted, tmp_path, wrap):
    torch.save(wrap(converted.state_dict()), tmp_path / "net.pth")
    plan = cs.plan_of(tmp_path / "net.pth")
    assert plan == cs.get_plan(converted)
    assert not cs.get_plan(cs.load_converted(type(converted)(), tmp_path / "net.pth")).diff(plan)


def test_an_average_of_weights_is_loaded_rather_than_the_weights_as_timm_does(converted, tmp_path):
    average = copy.deepcopy(converted)
    nn.init.constant_(average.head.bias, 5)
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": converted.state_dict(), "state_dict_ema": average.state_dict()}, file)
    for load in (cs.load_converted, timm.models.load_checkpoint):
        fresh = cs.apply_plan(type(converted)(), cs.get_plan(converted))
        load(fresh, str(file))
        assert torch.equal(fresh.head.bias, average.head.bias)


def test_a_plan_of_other_weights_in_the_same_file_is_not_that_of_those_that_are_loaded(converted, tmp_path):
    plain = type(converted)()
    torch.save({"state_dict": converted.state_dict(), "state_dict_ema": plain.state_dict()}, tmp_path / "last.pth.tar")
    assert cs.plan_of(tmp_path / "last.pth.tar") is None
    with pytest.raises(cs.CheckpointError, match="holds no plan"):
        cs.load_converted(plain, tmp_path / "last.pth.tar")


def test_a_file_of_save_converted_tells_the_plan(converted, tmp_path):
    cs.save_converted(converted, tmp_path / "net.safetensors")
    assert cs.plan_of(tmp_path / "net.safetensors") == cs.get_plan(converted)


class Holder(nn.Module):
    """A network with one child, of any name."""

    def __init__(self, name, child):
        super().__init__()
        self.add_module(name, child)


def test_the_name_of_a_wrapper_is_no_part_of_the_names(converted):
    assert cs.plan_of(Holder("module", converted).state_dict()) == cs.get_plan(converted)
    assert cs.plan_of(Holder("_orig_mod", Holder("module", converted)).state_dict()) == cs.get_plan(converted)


WRAPPERS = {
    "data parallelism": nn.DataParallel,
    "torch.compile": torch.compile,
    "an average": AveragedModel,
    "an average of a parallel one": lambda net: AveragedModel(nn.DataParallel(net)),
    "Lightning": lambda net: Holder("model", net),
}
WRITERS = {
    "net.safetensors": cs.save_converted,
    "guarded.safetensors": lambda net, path: cs.save_converted(net, path, guard=True),
    "net.pth": lambda net, path: torch.save(net.state_dict(), path),
}


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_file_of_a_wrapped_network_loads_into_the_bare_one(converted, image, tmp_path, wrapper, file):
    WRITERS[file](WRAPPERS[wrapper](converted), tmp_path / file)
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / file)
    assert torch.equal(fresh(image), converted(image))
    assert not cs.get_plan(fresh).diff(cs.get_plan(converted))


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("others", [{}, {"head": nn.Linear(2, 2)}], ids=["alone", "beside another"])
def test_a_network_may_call_a_part_as_wrappers_do(converted, tmp_path, others, file):
    model, fresh = (nn.ModuleDict({"module": net, **others}) for net in (converted, type(converted)()))
    WRITERS[file](model, tmp_path / file)
    cs.load_converted(fresh, tmp_path / file)
    assert torch.equal(fresh["module"].stem.weight, converted.stem.weight)
    assert not cs.get_plan(fresh).diff(cs.get_plan(model))


@pytest.mark.parametrize("file", WRITERS)
def test_what_a_network_calls_as_wrappers_do_stays_in_the_wrapped_one(converted, tmp_path, file):
    WRITERS[file](nn.DataParallel(Holder("module", converted)), tmp_path / file)
    fresh = cs.load_converted(Holder("module", type(converted)()), tmp_path / file)
    assert torch.equal(fresh.module.stem.weight, converted.stem.weight)


def test_a_convolution_that_two_parts_share_is_found_under_the_names_of_all_weights(tmp_path):
    def build():
        net = Holder("conv", nn.Conv2d(4, 4, 3))
        net.add_module("module", Holder("conv", net.conv))
        return net

    model = build()
    cs.to_coconv_(model.conv, (1, 2))
    cs.save_converted(nn.DataParallel(model), tmp_path / "net.safetensors")
    fresh = cs.load_converted(build(), tmp_path / "net.safetensors")
    assert fresh.conv.contextual_levels == model.conv.contextual_levels
    assert torch.equal(fresh.conv.weight, model.conv.weight)


def test_weights_of_a_part_beside_others_do_not_load_into_it_and_it_is_named(converted, net, tmp_path):
    torch.save(nn.ModuleDict({"model": converted, "loss": nn.Linear(2, 2)}).state_dict(), tmp_path / "net.pth")
    fresh = type(net)()
    with pytest.raises(ValueError, match=r"unexpected, as loss\.bias\. All that it has are there under 'model'"):
        cs.load_converted(fresh, tmp_path / "net.pth")
    assert not cs.get_plan(fresh).converted


def test_an_average_beside_the_weights_is_loaded_as_it_is_saved(converted, image, tmp_path):
    """As torchvision's reference script writes them by ``--model-ema``."""
    average = AveragedModel(converted)
    torch.save({"model": converted.state_dict(), "model_ema": average.state_dict()}, tmp_path / "net.pth")
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))


def training(net):
    optimizer = torch.optim.Adam(net.parameters())
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    return {"epoch": 1, "optimizer_state_dict": optimizer.state_dict(), "rng": torch.get_rng_state()}


@pytest.mark.parametrize("name", ["model_state_dict", "net", "ema", "generator"])
def test_weights_are_found_under_whatever_name_a_script_keeps_them(converted, image, tmp_path, name):
    torch.save({**training(converted), name: converted.state_dict()}, tmp_path / "net.pth")
    assert cs.plan_of(tmp_path / "net.pth") == cs.get_plan(converted)
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))


def test_of_several_networks_in_a_file_the_one_that_fits_is_loaded(converted, image, tmp_path):
    other = cs.convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)), input_size=32)
    states = {"generator": converted.state_dict(), "discriminator": other.state_dict()}
    torch.save(states, tmp_path / "net.pth")
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))
    with pytest.raises(cs.CheckpointError, match=r"converted networks under 'generator', 'discriminator'"):
        cs.plan_of(tmp_path / "net.pth")
    assert cs.plan_of(states["discriminator"]) == cs.get_plan(other)


def test_of_several_that_fit_alike_none_is_loaded(converted, net, tmp_path):
    torch.save({"net": converted.state_dict(), "best": converted.state_dict()}, tmp_path / "net.pth")
    fresh = type(net)()
    with pytest.raises(cs.CheckpointError, match="holds weights under 'net' and under 'best' that fit alike"):
        cs.load_converted(fresh, tmp_path / "net.pth")
    assert not cs.get_plan(fresh).converted


@pytest.mark.parametrize(
    "others",
    [
        {"model": {"arch": "tiny", "depth": 3}},
        {"state_dict": {}},
        {"scaler": {"scale": torch.ones(1)}},
        {"model": "tiny"},
    ],
    ids=str,
)
def test_what_holds_no_weights_of_it_is_not_taken_for_them(converted, image, tmp_path, others):
    torch.save({**others, "net": converted.state_dict()}, tmp_path / "net.pth")
    assert cs.plan_of(tmp_path / "net.pth") == cs.get_plan(converted)
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))


def test_the_plan_of_a_teacher_beside_plain_weights_is_not_theirs(converted, net, tmp_path):
    plain = dict(type(net)().state_dict())
    torch.save({"state_dict": plain, "teacher": converted.state_dict()}, tmp_path / "net.pth")
    assert cs.plan_of(tmp_path / "net.pth") is None


def test_names_that_were_cut_short_by_hand_are_those_of_the_plan_as_well(converted, image, tmp_path):
    state = Holder("net", converted).state_dict()
    for name in [*state]:
        state[name.removeprefix("net.")] = state.pop(name)
    torch.save(state, tmp_path / "net.pth")
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))


@pytest.mark.parametrize("file", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("take_out", [lambda net: net.body.pop(0), lambda net: setattr(net, "body", nn.Identity())])
def test_a_convolution_that_was_taken_out_since_is_not_in_the_plan(converted, tmp_path, file, take_out):
    take_out(converted)
    WRITERS[file](converted, tmp_path / file)
    fresh = type(converted)()
    take_out(fresh)
    cs.load_converted(fresh, tmp_path / file)
    assert [row.name for row in cs.get_plan(fresh).converted] == ["stem"]
    assert torch.equal(fresh.stem.weight, converted.stem.weight)


@pytest.mark.parametrize("wrapper", [lambda net: net, nn.DataParallel], ids=["bare", "wrapped"])
@pytest.mark.parametrize("file", WRITERS)
def test_weights_of_a_version_are_not_taken_for_older_ones(tmp_path, file, wrapper):
    class Scaled(nn.Module):
        _version = 2

        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.ones(1))

        def _load_from_state_dict(self, state_dict, prefix, metadata, *others):
            if metadata.get("version", 1) < 2:
                state_dict[f"{prefix}scale"] = state_dict[f"{prefix}scale"] / 255
            super()._load_from_state_dict(state_dict, prefix, metadata, *others)

    model = nn.Sequential(Scaled())
    cs.to_coconv_(model[0].conv, (1, 2))
    WRITERS[file](wrapper(model), tmp_path / file)
    assert cs.load_converted(nn.Sequential(Scaled()), tmp_path / file)[0].scale == 1


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: Holder("module", net)], ids=["bare", "wrapped"])
def test_a_network_whose_only_child_was_converted_loads_its_own_weights(net, tmp_path, wrap):
    """As Lightning keeps them of a module that holds a network."""
    torch.save({"state_dict": wrap(Holder("net", cs.convert(net, input_size=32))).state_dict()}, tmp_path / "last.ckpt")
    fresh = cs.load_converted(Holder("net", type(net)()), tmp_path / "last.ckpt")
    assert not cs.get_plan(fresh.net).diff(cs.get_plan(net))
    assert torch.equal(fresh.net.stem.weight, net.stem.weight)


def test_the_plans_of_parts_are_told_by_the_names_of_the_whole(net):
    parts = nn.ModuleDict({"one": cs.convert(type(net)(), input_size=32), "two": cs.convert(net, input_size=32)})
    parts["head"] = nn.Linear(2, 2)
    plan = cs.plan_of(parts.state_dict())
    assert [row.name for row in plan.converted] == ["one.stem", "one.body.0", "two.stem", "two.body.0"]
    del parts["two"]
    assert [row.name for row in cs.plan_of(parts.state_dict()).converted] == ["one.stem", "one.body.0"]


@pytest.mark.parametrize(
    ("undo", "left"),
    [(lambda net: cs.revert(net.body), "stem"), (lambda net: cs.to_conv_(net.stem), "body.0")],
    ids=["a part reverted", "by hand"],
)
def test_what_was_made_plain_since_is_told_as_plain(converted, image, tmp_path, undo, left):
    undo(converted)
    torch.save(converted.state_dict(), tmp_path / "net.pth")
    assert [row.name for row in cs.plan_of(tmp_path / "net.pth").converted] == [left]
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))


@pytest.mark.parametrize("way", ["whole", "part", "levels alone"])
def test_a_part_that_is_held_twice_is_told_under_both_names(net, tmp_path, way):
    twice, fresh = (nn.ModuleDict({"one": part, "two": part}) for part in (net, type(net)()))
    if way == "levels alone":
        cs.to_coconv_(net.stem, (1, 5))
    else:
        cs.convert(net, input_size=32)
    plan = cs.get_plan(twice)
    if way == "whole":
        cs.revert(net)
        cs.apply_plan(twice, plan)
    torch.save(twice.state_dict(), tmp_path / "net.pth")
    cs.load_converted(fresh, tmp_path / "net.pth")
    assert not cs.get_plan(fresh).diff(plan)


def test_levels_that_differ_are_refused_where_the_network_has_one_convolution_for_both(tmp_path):
    parts = nn.ModuleDict({"one": nn.Conv2d(8, 8, 3), "two": nn.Conv2d(8, 8, 3)})
    cs.to_coconv_(parts["one"], (1, 2))
    cs.to_coconv_(parts["two"], (1, 3))
    with cs.unchecked_levels():
        parts["two"].load_state_dict(parts["one"].state_dict())
    torch.save(parts.state_dict(), tmp_path / "net.pth")
    conv = nn.Conv2d(8, 8, 3)
    with pytest.raises(cs.PlanError, match="1 repeated in the plan: one"):
        cs.load_converted(nn.ModuleDict({"one": conv, "two": conv}), tmp_path / "net.pth")


def test_what_was_never_converted_says_nothing(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    assert cs.plan_of(tmp_path / "net.pth") is None
    assert cs.plan_of(cs.revert(cs.convert(net, input_size=32)).state_dict()) is None


def test_what_has_lost_its_metadata_says_nothing(converted, tmp_path):
    save_file(converted.state_dict(), tmp_path / "net.safetensors")
    assert cs.plan_of(tmp_path / "net.safetensors") is None
    assert cs.plan_of(dict(converted.state_dict())) is None


def test_a_guard_tells_the_plan_whatever_was_lost(converted, tmp_path):
    cs.guard(converted)
    save_file(converted.state_dict(), tmp_path / "net.safetensors")
    for source in (tmp_path / "net.safetensors", dict(converted.state_dict())):
        assert not cs.plan_of(source).diff(cs.get_plan(converted))


def test_a_shared_convolution_is_one_row(tmp_path):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    cs.convert(model, overrides={"0": 2}, input_size=(4, 32, 32))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    assert cs.plan_of(tmp_path / "net.pth") == cs.get_plan(model)


def test_a_function_call_in_a_graph_is_told_by_the_plan(tmp_path):
    plain, image = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.ones(1, 4, 32, 32)
    model = torch.export.export(plain, (image,)).module()
    cs.convert(model, example_inputs=image)
    assert cs.get_plan(model).converted
    assert cs.plan_of(model.state_dict()) == cs.get_plan(model)


def test_the_guard_of_a_part_tells_it_by_the_names_of_the_whole(converted):
    whole = nn.ModuleDict({"backbone": cs.guard(converted), "head": nn.Linear(2, 2)})
    assert [row.name for row in cs.plan_of(dict(whole.state_dict())).converted] == ["backbone.stem", "backbone.body.0"]
    del whole["head"]
    assert [row.name for row in cs.plan_of(dict(whole.state_dict())).converted] == ["backbone.stem", "backbone.body.0"]


def test_a_guard_without_numbers_says_nothing(converted):
    assert cs.plan_of(dict(cs.guard(converted).to("meta").state_dict())) is None


@pytest.mark.parametrize("convert", [True, False], ids=["beside a plan", "alone"])
def test_levels_that_no_plan_tells_are_told(net, tmp_path, convert):
    if convert:
        cs.convert(net, input_size=32)
    cs.to_coconv_(net.stem, (1, 5))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    rows = [row for row in cs.get_plan(net).rows if row.converted]
    assert list(cs.plan_of(tmp_path / "net.pth").rows) == rows


def test_metadata_that_make_no_sense_are_an_error(converted):
    state = converted.state_dict()
    state._metadata[""]["coconv_plan"] = '{"format": "coconv-plan"'
    with pytest.raises(cs.PlanError, match="the state dict is not JSON"):
        cs.plan_of(state)
    del state._metadata[""]["coconv_plan"]
    for nonsense in (3, {"dilations": "x"}, {"dilations": (1, "2"), "splits": (4, 4)}):
        state._metadata["stem"]["coconv_levels"] = nonsense
        with pytest.raises(cs.CheckpointError, match="makes no sense"):
            cs.plan_of(state)


def test_coresnets_tell_their_plan(tmp_path):
    model = timm.create_model("coresnet18")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    assert cs.plan_of(tmp_path / "net.pth") == cs.get_plan(model)


def test_a_checkpoint_that_tells_its_plan_is_loaded_like_a_file_of_ours(converted, image, tmp_path):
    torch.save({"state_dict": nn.ModuleDict({"module": converted}).state_dict()}, tmp_path / "net.pth")
    fresh = cs.load_converted(type(converted)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), converted(image))
    assert cs.get_plan(fresh) == cs.get_plan(converted)


def test_levels_without_a_plan_are_enough_to_load(net, image, tmp_path):
    cs.to_coconv_(net.stem, (1, 5))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    fresh = cs.load_converted(type(net)().eval(), tmp_path / "net.pth")
    assert torch.equal(fresh(image), net(image))


def test_a_checkpoint_that_tells_no_plan_is_refused(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(cs.CheckpointError, match="holds no plan: it comes from a plain network"):
        cs.load_converted(net, tmp_path / "net.pth")
