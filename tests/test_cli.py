"""The command line, as a process."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import coconv_surgery as cs

COCONV = Path(sys.executable).with_name("coconv")


def coconv(*arguments, cwd=None):
    return subprocess.run([COCONV, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_plan_prints_the_table_and_the_summary_and_saves_json_and_a_picture(tmp_path):
    json_path, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    done = coconv("plan", "resnet18", "--input-size", 64, "--json", json_path, "--figure", figure)
    assert done.returncode == 0, done.stderr
    plan = cs.Plan.from_json(json_path)
    assert done.stdout == f"{plan.table()}\n{plan.summary()}\n"
    assert plan == cs.plan_conversion(timm.create_model("resnet18"), input_size=64)
    assert Image.open(figure).size > (500, 500)


def test_plan_takes_policies_patterns_and_their_settings():
    done = coconv(
        "plan", "resnet18", "--policy", "uniform", "--split", "even", "--include", "layer1", "--exclude", "*.conv2"
    )
    assert done.returncode == 0, done.stderr
    assert "20 convs: 2 converted" in done.stdout


def test_convert_writes_weights_that_load_with_their_plan(tmp_path):
    weights = timm.create_model("resnet18", zero_init_last=False)
    torch.save({"state_dict": weights.state_dict()}, tmp_path / "w.pth")
    output = tmp_path / "out.safetensors"
    done = coconv("convert", "resnet18", "--checkpoint", tmp_path / "w.pth", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "20 convs: 12 converted" in done.stdout
    loaded = cs.load_converted(timm.create_model("resnet18"), output).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), cs.convert(weights).eval()(image))


def test_convert_replays_a_saved_plan(tmp_path):
    cs.plan_conversion(timm.create_model("resnet18"), "top").to_json(tmp_path / "plan.json")
    done = coconv("convert", "resnet18", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert cs.read_plan(tmp_path / "out.safetensors") == cs.Plan.from_json(tmp_path / "plan.json")


def test_demo_converts_a_network_on_a_photograph(tmp_path):
    done = coconv("demo", "--output", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert "parameter tensors are the same objects" in done.stdout
    assert "25,557,032 parameters before = after" in (tmp_path / "demo" / "plan.txt").read_text()
    assert len(cs.Plan.from_json(tmp_path / "demo" / "plan.json").converted) == 13
    assert Image.open(tmp_path / "demo" / "plan.png").size > (500, 500)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "resnet5"], 1, "timm has no model 'resnet5': did you mean resnet50"),
        (["plan", "resnet18", "--policy", "stag"], 1, "did you mean 'stage'"),
        (["plan", "resnet18", "--policy", "stag", "--split", "even"], 1, "did you mean 'stage'"),
        (["plan", "resnet18", "--policy", "stage", "--max-levels", "3"], 1, "does not take max_levels"),
        (["plan", "resnet18", "--include", "layr1"], 1, "no convolution matches 'layr1': did you mean 'layer1'"),
        (["plan", "resnet18", "--input-size", "a"], 2, "'--input-size'"),
        (["plan", "vit_tiny_patch16_224", "--input-size", "16"], 1, "does not run on a 16 × 16 input"),
        (["convert", "resnet18"], 2, "Missing option '-o'"),
        (["convert", "resnet18", "--plan", "no.json", "-o", "x"], 2, "'no.json' does not exist"),
        (["convert", "resnet18", "--pretrained", "--checkpoint", __file__, "-o", "x"], 2, "choose one"),
        (["convert", "resnet18", "--plan", __file__, "--policy", "top", "-o", "x"], 2, "leave out --policy"),
        (["convert", "resnet18", "--plan", __file__, "-o", "x"], 1, "is not JSON"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(tmp_path, arguments, code, message):
    done = coconv(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
