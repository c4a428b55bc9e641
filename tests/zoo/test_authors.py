"""The authors' checkpoints, against a network written independently in their layout."""

import copy
import os
import pickle
import warnings

import pytest
import timm
import torch
from zoo.authors_resnet import authors_resnet

import coconv_surgery as cs
from coconv_surgery.zoo import merge_levels

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
WRAPPERS = {
    "bare": lambda state: state,
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "state_dict": lambda state: {"epoch": 90, "arch": "coresnet", "state_dict": state, "optimizer": {"state": {}}},
    "both": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return authors_resnet()


@pytest.fixture(scope="module")
def shared_model():
    return timm.create_model("coresnet50.iduta").eval()


@pytest.fixture
def model(shared_model):
    """A network that a test must leave as it was."""
    before = copy.deepcopy(shared_model.state_dict())
    yield shared_model
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared_model.state_dict().items())


@pytest.fixture
def image():
    return torch.randn(2, 3, 96, 96)


def assert_same_logits(model, theirs, image):
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(image), theirs(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_checkpoint_of_theirs_gives_their_logits(depth, image, tmp_path):
    theirs = authors_resnet(DEPTHS[depth])
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = timm.create_model(f"coresnet{depth}.iduta")
    assert cs.load_authors_checkpoint(model, tmp_path / "theirs.pth") is model
    assert_same_logits(model, theirs, image)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_it_loads_in_every_wrapping(theirs, wrapper, zipped, tmp_path):
    state = theirs.state_dict()
    torch.save(WRAPPERS[wrapper](state), tmp_path / "theirs.pth", _use_new_zipfile_serialization=zipped)
    model = timm.create_model("coresnet50.iduta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.load_authors_checkpoint(model, tmp_path / "theirs.pth")
    levels = [state[f"layer2.1.conv2.conv2_{level}.weight"] for level in (1, 2, 3)]
    assert torch.equal(model.layer2[1].conv2.weight, torch.cat(levels))
    assert torch.equal(model.fc.bias, state["fc.bias"])


def test_export_is_the_inverse(theirs, image):
    model = timm.create_model("coresnet50.iduta")
    model.load_state_dict(theirs.state_dict())
    exported = cs.export_authors_state_dict(model)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in theirs.state_dict().items())
    reader = authors_resnet()
    reader.load_state_dict(exported)
    assert_same_logits(model, reader, image)


def test_the_exported_levels_are_copies(model):
    exported = cs.export_authors_state_dict(model)
    exported["layer1.0.conv2.conv2_1.weight"].zero_()


def test_timms_own_loaders_take_their_file(theirs, image, tmp_path):
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    file = str(tmp_path / "theirs.pth")
    assert_same_logits(timm.create_model("coresnet50.iduta", checkpoint_path=file), theirs, image)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    assert_same_logits(timm.create_model("coresnet50.iduta", **overlay), theirs, image)
    tuned = timm.create_model("coresnet50.iduta", num_classes=10, features_only=True, **overlay)
    assert torch.equal(tuned["layer4"][2].conv2.weight, theirs.layer4[2].conv2.weight)


def test_the_papers_form_warns_that_theirs_differs(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = timm.create_model("coresnet50")
    with pytest.warns(UserWarning, match=r"coresnet50\.iduta"):
        cs.load_authors_checkpoint(model, tmp_path / "theirs.pth")
    with pytest.warns(UserWarning, match=r"coresnet50\.iduta"):
        model.load_state_dict(theirs.state_dict())


def test_the_papers_form_is_not_exported():
    with pytest.raises(ValueError, match=r"train 'coresnet50\.iduta' for it"):
        cs.export_authors_state_dict(timm.create_model("coresnet50"))


def test_levels_that_the_layout_has_no_place_for_are_not_exported():
    model = timm.create_model("coresnet50.iduta", policy=lambda conv: (1, 3))
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 has dilations \(1, 3\)"):
        cs.export_authors_state_dict(model)


@pytest.mark.filterwarnings("ignore::coconv_surgery.NoChangeWarning")
def test_convert_takes_their_checkpoint_on_the_command_line(theirs, image, tmp_path, coconv):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    arguments = "--checkpoint", tmp_path / "theirs.pth", "-o", tmp_path / "out.safetensors"
    assert coconv("convert", "coresnet50.iduta", *arguments).code == 0
    loaded = cs.load_converted(timm.create_model("coresnet50.iduta"), tmp_path / "out.safetensors")
    assert_same_logits(loaded, theirs, image)


def test_generic_layers_of_theirs_merge_with_their_biases():
    state = {f"conv.coconv_levels.{i}.{kind}": torch.full((2,), i) for i in (1, 0) for kind in ("weight", "bias")}
    assert merge_levels(state) == {"conv": (2, 2)}
    assert {name: tensor.tolist() for name, tensor in state.items()} == {
        "conv.weight": [0, 0, 1, 1],
        "conv.bias": [0, 0, 1, 1],
    }


def test_vgg_style_names_are_not_taken_for_levels():
    state = {"features.conv2_1.weight": torch.zeros(1), "features.conv2_2.weight": torch.zeros(1)}
    assert merge_levels(state) == {}
    assert len(state) == 2


def test_merging_keeps_to_its_prefix():
    state = {"a.conv2.conv2_1.weight": torch.zeros(1), "b.conv2.conv2_1.weight": torch.zeros(1)}
    assert merge_levels(state, "b.") == {"b.conv2": (1,)}
    assert set(state) == {"a.conv2.conv2_1.weight", "b.conv2.weight"}


@pytest.fixture
def grouped():
    """A network whose 3×3 convolutions have groups and levels."""
    return timm.create_model("coresnet50.iduta", cardinality=4, base_width=16)


def level_by_level(model):
    """A network's weights in their layout, whatever they would compute."""
    state = dict(model.state_dict())
    for name, conv in model.named_modules():
        if isinstance(conv, cs.CoConv2d):
            levels = state.pop(f"{name}.weight").split(conv.splits)
            state |= {f"{name}.conv2_{level}.weight": weight for level, weight in enumerate(levels, start=1)}
    return state


def test_groups_with_levels_are_not_exported(grouped):
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 has 4 groups and 4 levels: every level of the authors'"):
        cs.export_authors_state_dict(grouped)


def test_groups_with_levels_are_not_loaded(grouped, tmp_path):
    torch.save(level_by_level(grouped), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"theirs\.pth does not fit CoResNet: layer1\.0\.conv2 has 4 groups"):
        cs.load_authors_checkpoint(grouped, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 has 4 groups and 4 levels"):
        grouped.load_state_dict(level_by_level(grouped))


def test_groups_without_levels_are_theirs_and_ours(tmp_path):
    model = timm.create_model("coresnet50.iduta", cardinality=4, base_width=16, levels=(1, 1, 1, 1))
    exported = cs.export_authors_state_dict(model)
    assert exported.keys() == model.state_dict().keys()


# -- Bad input ----------------------------------------------------------------------------------------------------


def without(name):
    return lambda state: state.pop(name)


def renamed(old, new):
    return lambda state: state.update({new: state.pop(old)})


def reshaped(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("bn1.bias"), r"missing in the file: bn1\.bias$"),
        (renamed("fc.bias", "head.bias"), r"missing in the file: fc\.bias\nunexpected in the file: head\.\*$"),
        (reshaped("fc.weight", 10, 2048), r"of another shape: fc\.weight \(10×2048 in the file, 1000×2048 in the net"),
        (without("layer2.0.conv2.conv2_2.weight"), r"damaged: layer2\.0\.conv2: levels \[1, 3\] are not all there"),
        (reshaped("layer2.0.conv2.conv2_2.weight", 32, 9, 3, 3), r"layer2\.0\.conv2: the levels' shapes"),
        (
            reshaped("layer1.0.conv2.weight", 64, 64, 3, 3),
            r"layer1\.0\.conv2: there is a weight for each level and one",
        ),
        (reshaped("layer1.0.conv2.conv2_5.weight", 8, 64, 3, 3), r"of another shape: layer1\.0\.conv2\.weight \(72×64"),
        (lambda state: state.update({"note": "hello"}), "holds a str under 'note'"),
    ],
)
def test_every_key_that_does_not_fit_is_named(model, theirs, damage, message, tmp_path):
    state = dict(theirs.state_dict())
    damage(state)
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=message):
        cs.load_authors_checkpoint(model, tmp_path / "theirs.pth")


def test_another_depth_is_named_block_by_block(model, tmp_path):
    with torch.device("meta"):
        deeper = authors_resnet((3, 5, 8, 3)).state_dict()
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in deeper.items()}, tmp_path / "deeper.pth")
    with pytest.raises(
        ValueError, match=r"unexpected in the file: layer2\.4\.\*, layer3\.6\.\*, layer3\.7\.\*$"
    ) as error:
        cs.load_authors_checkpoint(model, tmp_path / "deeper.pth")
    assert "does not fit CoResNet, which is left as it was" in str(error.value)


def test_other_levels_are_named(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = timm.create_model("coresnet50.iduta", levels=(4, 3, 1, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="with other levels") as error:
        cs.load_authors_checkpoint(model, tmp_path / "theirs.pth")
    assert "layer3.0.conv2 ((128, 128) in the file, (256,) in the network)" in str(error.value)
    assert "layer4.2.conv2 ((512,) in the file, (256, 256) in the network)" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_ordinary_checkpoint_is_named_as_one(model, tmp_path):
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="not in the CoConv authors' layout"):
        cs.load_authors_checkpoint(model, tmp_path / "plain.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_one_error(model, theirs, zipped, share, tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"theirs.pth is not a complete checkpoint: "):
        cs.load_authors_checkpoint(model, path)


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("on_command_line", [True, False])
def test_code_in_a_file_is_refused_and_not_executed(model, theirs, zipped, on_command_line, tmp_path, coconv):
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save({"state_dict": theirs.state_dict(), "x": Code(marker)}, path, _use_new_zipfile_serialization=zipped)
    if on_command_line:
        message = coconv("convert", "resnet18", "--checkpoint", path, "-o", tmp_path / "out").err
        assert "evil.pth holds more than tensors (posix.mkdir)" in message
    else:
        with pytest.raises(ValueError, match=r"evil\.pth holds more than tensors \(posix\.mkdir\)"):
            cs.load_authors_checkpoint(model, path)
    assert not marker.exists()
    with path.open("rb") as file:  # what another loader would have done
        assert torch.load(file, weights_only=False)["x"] is None
    assert marker.exists()


def test_a_file_that_is_no_checkpoint_is_named(model, tmp_path):
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1, 2], protocol=2))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name in ("list.pth", "text.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a complete checkpoint"):
            cs.load_authors_checkpoint(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        cs.load_authors_checkpoint(model, tmp_path / "nothing.pth")
