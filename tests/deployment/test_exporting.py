"""What is written for another program computes there what the network computes here."""

import pytest
import timm
import torch
import torch.nn as nn

from coconv_surgery import DeploymentError, convert, deploy, save_converted
from coconv_surgery.deployment.exporting import FORMATS, export


@pytest.fixture
def file(tmp_path):
    """A converted network in a file."""
    network = convert(timm.create_model("test_resnet"), input_size=64)
    save_converted(network, tmp_path / "converted.safetensors")
    return tmp_path / "converted.safetensors"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_converted_checkpoint_is_exported(coconv, file, suffix):
    output = file.with_suffix(suffix)
    done = coconv("export", "test_resnet", "--checkpoint", file, "--input-size", "64", "-o", output)
    assert done.code == 0, done.err
    report, written = done.out.splitlines()
    assert "contextual convolutions written out as" in report
    assert "0 batch norms" in written
    assert "largest difference" in written
    assert written.endswith("; for images of 1×3×64×64")
    assert sum(path.stat().st_size for path in file.parent.iterdir() if path != file) > 1e5
    beside = {".xml": {".bin"}}.get(suffix, set())
    assert {path.suffix for path in file.parent.iterdir()} == {".safetensors", suffix, *beside}


def test_an_export_is_for_the_size_that_the_conversion_was_planned_for(coconv, file):
    done = coconv("export", "test_resnet", "--checkpoint", file, "-o", file.with_suffix(".pt2"))
    assert done.out.rstrip().endswith("; for images of 1×3×64×64")


def test_a_detector_is_exported_for_the_images_of_its_pipeline(coconv, tmp_path):
    done = coconv("export", "configs/shapes/ssd_coresnet18_shapes.py", "-o", tmp_path / "ssd.pt2")
    assert done.code == 0, done.err
    assert "; for images of 1×3×192×192" in done.out


def test_a_detector_of_a_config_is_exported(coconv, tmp_path):
    config = "configs/shapes/ssd_coresnet18_shapes.py"
    done = coconv("export", config, "--input-size", "96", "-o", tmp_path / "ssd.onnx")
    assert done.code == 0, done.err
    assert "backbone, neck and the head's raw outputs" in done.out
    assert "0 batch norms" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "net.tflite"), "net.tflite must end with one of .onnx, .pt2, .xml"),
        (("--input-size", "9000", "-o", "net.onnx"), "too large to run the network on"),
        (("--pretrained", "--checkpoint", __file__, "-o", "net.onnx"), "both give the weights"),
        (("--input-size", "1", "-o", "net.onnx"), "the network does not run on the inputs to deploy it for"),
        (("-o", "missing/net.pt2"), "missing"),
    ],
)
def test_a_wrong_call_gets_one_message_and_writes_nothing(coconv, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = coconv("export", "test_vit" if "1" in arguments else "test_resnet", *arguments)
    assert done.code not in (0, None)
    assert message in done.err + str(done.code)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_written_over(coconv, file):
    weights = file.rename(file.with_suffix(".bin"))
    before = weights.read_bytes()
    done = coconv("export", "test_resnet", "--checkpoint", weights, "-o", file.with_suffix(".xml"))
    assert done.code == 2
    assert "would be written over" in done.err
    assert weights.read_bytes() == before


def test_norms_of_layers_are_not_counted_as_batch_norms(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.LayerNorm(900)).eval()
    for suffix in FORMATS:
        written = export(deploy(network, input_size=32), tmp_path / f"net{suffix}", torch.rand(1, 3, 32, 32))
        assert (written.convolutions, written.norms) == (1, 0)


def test_a_file_that_would_compute_something_else_is_not_written(tmp_path):
    class Drawing(nn.Module):
        """Random, as a network is not in evaluation mode."""

        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(DeploymentError, match=r"net.pt2 would compute something else, by .* of the largest number"):
        export(Drawing(), tmp_path / "net.pt2", torch.rand(1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


class Odd(nn.Module):
    """Does what not every format holds."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = self.conv(x.to(self.conv.weight.dtype))
        if self.how == "branch":
            return y if x.mean() > 0.5 else -y
        return {"image": (y, x), "number": (y, 3)}.get(self.how, y)


@pytest.mark.parametrize(
    ("network", "suffix", "message"),
    [
        (lambda: Odd("").bfloat16(), ".onnx", r"tensor\(bfloat16\)"),
        (lambda: Odd("number"), ".onnx", "int"),
        (lambda: Odd("number"), ".xml", "Only tensors"),
        (lambda: Odd("branch"), ".pt2", "data-dependent"),
    ],
)
def test_what_a_format_does_not_hold_is_one_error_and_not_written(tmp_path, capfd, network, suffix, message):
    with pytest.raises(DeploymentError, match=rf"net{suffix} cannot be written \(.*{message}") as caught:
        export(network(), tmp_path / f"net{suffix}", torch.rand(1, 3, 16, 16))
    assert "single precision" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_that_the_network_returns_is_compared_too(tmp_path, suffix):
    assert export(Odd("image"), tmp_path / f"net{suffix}", torch.rand(1, 3, 16, 16)).difference < 1e-5


def test_several_outputs_are_compared(tmp_path):
    network = timm.create_model("test_resnet", features_only=True).eval()
    written = export(deploy(network, input_size=64), tmp_path / "net.onnx", torch.rand(1, 3, 64, 64), like=network)
    assert written.difference < 1e-5
    assert written.norms == 0
