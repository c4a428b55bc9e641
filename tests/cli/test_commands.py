"""The command line, as a process."""

import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from launching import python
from PIL import Image
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import coconv_surgery as cs
from coconv_cli import console, main, measuring, options
from coconv_surgery.bench.run import Target
from coconv_surgery.bench.speed import ENGINES
from coconv_surgery.layers.levels import SplitRule
from coconv_surgery.planning.policies import POLICIES
from coconv_surgery.sweep.collections import COLLECTIONS
from coconv_surgery.sweep.walk import read_rows

CONFIG = str(Path("configs/shapes/ssd_r18_shapes.py").absolute())


def test_the_installed_command_ends_a_mistake_with_one_line():
    command = Path(sys.executable).with_name("coconv")
    done = subprocess.run([command, "plan", "resnet5"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("coconv: timm has no model 'resnet5': did you mean 'resnet50'")
    assert done.stderr.count("\n") == 1


def test_without_click_the_command_says_in_one_line_what_to_install():
    done = python("from coconv_cli import main; main()", click=None)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "coconv: click is not installed: pip install 'coconv-surgery[cli]'\n"


def test_what_the_command_does_can_be_imported_without_click():
    parts = ", ".join(f"coconv_surgery.cli.{part}" for part in ("targets", "running", "weights"))
    done = python(f"import {parts}", click=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["run", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys; sys.argv = ['coconv', *sys.argv[1:]]\nfrom coconv_cli import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("0 False False\n")


def test_tab_completes_commands_and_options():
    command = Path(sys.executable).with_name("coconv")
    for words, expected in (("coconv pl", "plan"), ("coconv plan --pol", "--policy")):
        asked = {"_COCONV_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([command], capture_output=True, text=True, env={**os.environ, **asked})
        assert done.stdout == f"plain,{expected}\n"


def test_the_choices_are_those_of_the_library():
    assert tuple(POLICIES) == options.POLICIES
    assert get_args(SplitRule) == options.SPLITS
    assert get_args(Target) == measuring.BENCHMARKS
    assert measuring.ENGINES == ENGINES
    assert tuple(COLLECTIONS) == measuring.COLLECTIONS


def test_a_traceback_is_shown_where_it_is_asked_for(coconv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coconv", "--debug", "plan", "resnet5"])
    with pytest.raises(ValueError, match="timm has no model 'resnet5'"):
        main()


def test_what_is_not_installed_is_told_with_its_extra():
    code = "import sys; sys.argv = ['coconv', 'sweep', 'timm']; from coconv_cli import main; main()"
    done = python(code, pebble=None)
    assert done.returncode == 1
    assert done.stderr == "coconv: pebble is not installed: pip install 'coconv-surgery[sweep]'\n"


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_another_name_of_a_file_that_is_read_is_not_written_over(coconv, tmp_path, link):
    weights, other = tmp_path / "weights.pth", tmp_path / "other.safetensors"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    getattr(other, link)(weights)
    assert "would be written over" in coconv("convert", "test_resnet", "--checkpoint", weights, "-o", other).err


def test_a_folder_that_is_read_gets_new_files_alone(coconv, tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    over, new = tmp_path / "model.safetensors", tmp_path / "converted.safetensors"
    assert "would be written over" in coconv("convert", f"local-dir:{tmp_path}", "-o", over).err
    assert "would be written over" in coconv("convert", f"local_dir:{tmp_path}", "-o", over).err
    assert coconv("convert", f"local-dir:{tmp_path}", "-o", new).code == 0


def test_what_a_format_needs_is_told_before_the_work(coconv, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = coconv("export", "no-such-network", "-o", tmp_path / "net.xml")
    assert done == (1, "", "coconv: openvino is not installed: pip install 'coconv-surgery[openvino]'\n")


def test_a_plan_goes_to_standard_output_as_json_alone(coconv):
    done = coconv("plan", "test_resnet", "--json", "-")
    assert done.code == 0, done.err
    assert cs.Plan.from_json(done.out) == cs.plan_conversion(timm.create_model("test_resnet"))


def test_a_narrow_terminal_gets_paragraphs(coconv, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = coconv("plan", "test_resnet")
    assert code == 0
    table, _summary = out.rstrip("\n").rsplit("\n", 1)
    assert "\n  levels              4\n" in table
    assert max(map(len, table.splitlines())) <= 40


def test_colours_are_left_out_where_they_are_not_wanted():
    code = "from coconv_cli.console import console; console.print('[red]done')"
    shown = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **extra}).stderr
        for extra in ({"FORCE_COLOR": "1", "TERM": "xterm"}, {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1"})
    ]
    assert [bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text)) for text in shown] == [True, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "resnet18", "--json", "none/plan.json"),
        ("plan", "resnet18", "--figure", "none/plan.png"),
        ("convert", "resnet18", "-o", "none/net.safetensors"),
        ("export", "resnet18", "-o", "none/net.onnx"),
        ("demo", "-o", "file/demo"),
        ("bench", "layers", "-o", "file/bench"),
        ("shapes", "file"),
    ],
)
def test_where_it_would_write_is_checked_before_any_work(coconv, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(timm, "create_model", None)  # which any work would call
    done = coconv(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "none does not exist" in done.err or "file" in done.err


def test_a_figure_of_an_unknown_kind_is_refused_before_any_work(coconv, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)
    assert "the suffix of" in coconv("plan", "resnet18", "--figure", tmp_path / "plan.docx").err


def test_progress_shows_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PATIENCE", 0)
    assert list(console.tracked("ab", "letters")) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(" after")[0] for line in err.splitlines()] == [
        "coconv:   0%",
        "coconv:  50%",
        "coconv: 100%",
    ]


def test_work_that_takes_long_shows_in_a_log_and_its_prints_are_not_the_result(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PATIENCE", 0)
    with console.doing("counting"):
        print("a library's warning")
        time.sleep(0.2)
    assert sorted(capsys.readouterr().err.splitlines()) == ["a library's warning", "coconv: counting …"]


def test_weights_that_do_not_fit_are_named_in_one_line(coconv, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.pth")
    done = coconv("convert", "test_resnet", "--weights", tmp_path / "w.pth", "-o", tmp_path / "out.safetensors")
    assert done.code == 1
    assert "do not fit ResNet: 2 of another shape, as fc.weight (7×" in done.err
    assert done.err.count("\n") == 1


def _as_lightning(network):
    return {"state_dict": {f"model.{name}": value for name, value in network.state_dict().items()}, "epoch": 3}


def _as_torchvision(network):
    average = AveragedModel(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return {"model": network.state_dict(), "model_ema": average.state_dict(), "epoch": 3}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("saved", [_as_lightning, _as_torchvision])
def test_plain_weights_are_taken_as_training_scripts_save_them(coconv, tmp_path, saved, suffix):
    network = timm.create_model("test_resnet", zero_init_last=False)
    expected = copy.deepcopy(network.state_dict())
    content, path = saved(network), tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(content, path)
    else:
        save_file(next(content[key] for key in ("model_ema", "state_dict") if key in content), path)
    done = coconv("convert", "test_resnet", "--checkpoint", path, "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    loaded = cs.load_converted(timm.create_model("test_resnet"), tmp_path / "out.safetensors").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_plan_prints_the_table_and_the_summary_and_saves_json_and_a_picture(coconv, tmp_path):
    json_path, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    done = coconv("plan", "resnet18", "--input-size", 64, "--json", json_path, "--figure", figure)
    assert done.code == 0, done.err
    plan = cs.Plan.from_json(json_path)
    assert done.out == f"{plan.table()}\n{plan.summary()}\n"
    assert plan == cs.plan_conversion(timm.create_model("resnet18"), input_size=64)
    assert Image.open(figure).size > (500, 500)


def test_plan_takes_policies_patterns_and_their_settings(coconv):
    done = coconv(
        "plan", "resnet18", "--policy", "uniform", "--split", "even", "--include", "layer1", "--exclude", "*.conv2"
    )
    assert done.code == 0, done.err
    assert "20 convs: 2 converted" in done.out


@pytest.mark.parametrize(("policy", "dilations"), [("stage(3,3,2,1)", "1, 2, 3"), ("top(4,3,2,1)", "4")])
def test_a_policy_by_name_works_on_the_command_line(coconv, policy, dilations):
    code, out, _ = coconv("plan", "resnet18", "--policy", policy)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("layer1.0.conv1")]
    assert [cell.strip() for cell in line.split("  ") if cell][4] == dilations


def test_a_policys_numbers_survive_other_options(coconv):
    _, out, _ = coconv("plan", "resnet18", "--policy", "stage(3,3,2,1)", "--split", "even")
    assert "22, 21, 21" in out


def test_convert_writes_weights_that_load_with_their_plan(coconv, tmp_path):
    weights = timm.create_model("resnet18", zero_init_last=False)
    torch.save({"state_dict": weights.state_dict()}, tmp_path / "w.pth")
    output = tmp_path / "out.safetensors"
    done = coconv("convert", "resnet18", "--checkpoint", tmp_path / "w.pth", "-o", output)
    assert done.code == 0, done.err
    assert "20 convs: 12 converted" in done.out
    loaded = cs.load_converted(timm.create_model("resnet18"), output).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image), cs.convert(weights).eval()(image))


def test_convert_replays_a_saved_plan(coconv, tmp_path):
    cs.plan_conversion(timm.create_model("resnet18"), "top").to_json(tmp_path / "plan.json")
    done = coconv("convert", "resnet18", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out.safetensors")
    assert done.code == 0, done.err
    assert cs.read_plan(tmp_path / "out.safetensors") == cs.Plan.from_json(tmp_path / "plan.json")


def test_demo_converts_a_network_on_a_photograph(coconv, tmp_path):
    done = coconv("demo", "--output", tmp_path / "demo")
    assert done.code == 0, done.err
    assert "parameter tensors are the same objects" in done.out
    assert "25,557,032 parameters before = after" in (tmp_path / "demo" / "plan.txt").read_text()
    assert len(cs.Plan.from_json(tmp_path / "demo" / "plan.json").converted) == 13
    assert Image.open(tmp_path / "demo" / "plan.png").size > (500, 500)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "resnet5"], 1, "timm has no model 'resnet5': did you mean 'resnet50'"),
        (["plan", "resnet18", "--policy", "stag"], 1, "did you mean 'stage'"),
        (["plan", "resnet18", "--policy", "stag", "--split", "even"], 1, "did you mean 'stage'"),
        (["plan", "resnet18", "--policy", "stage", "--max-levels", "3"], 1, "has no key 'max_levels'"),
        (["plan", "resnet18", "--include", "layr1"], 1, "no convolution matches 'layr1': did you mean 'layer1'"),
        (["plan", "resnet18", "--input-size", "a"], 2, "'--input-size'"),
        (["plan", "vit_tiny_patch16_224", "--input-size", "16"], 1, "does not run on a 16 × 16 input"),
        (["convert", "resnet18"], 2, "Missing option '-o'"),
        (["convert", "resnet18", "--plan", "no.json", "-o", "x"], 2, "'no.json' does not exist"),
        (["convert", "resnet18", "--pretrained", "--checkpoint", __file__, "-o", "x"], 2, "choose one"),
        (["convert", "resnet18", "--plan", __file__, "--policy", "top", "-o", "x"], 2, "leave out --policy"),
        (["convert", "resnet18", "--plan", __file__, "--min-channels", "8", "-o", "x"], 2, "leave out --min-channels"),
        (["convert", "resnet18", "--plan", __file__, "-o", "x"], 1, "is not JSON"),
        (["convert", "resnet18", "-o", "network.py"], 1, "network.py would be a safetensors file"),
        (["plan", "resnet18", "--json", "x.svg", "--figure", "x.svg"], 2, "x.svg cannot be two files"),
        (["plan", __file__, "--json", __file__], 2, "test_commands.py is read, and would be written over"),
        (["convert", "resnet18", "--checkpoint", __file__, "-o", __file__], 2, "would be written over"),
        (["convert", "resnet18", "--arg", "checkpoint_path=x", "-o", "y"], 1, "give a file of weights by --checkpoint"),
        (["sweep", "timm", "--timeout", "-5"], 2, "'--timeout'"),
        (["evaluate-gan", __file__, "--data", ".", "--crop", "a,b,c,d"], 2, "'a,b,c,d' is no crop: give TOP,LEFT,H,W"),
        (["evaluate-gan", __file__, "--data", ".", "--crop", "1,2,0,4"], 2, "'1,2,0,4' is no crop"),
        (["plan", CONFIG, "--input-size", "1x64x64"], 1, "have 3 channels: give --input-size HxW"),
        (["flops", CONFIG, "--input-size", "1x64x64"], 1, "have 3 channels: give --input-size HxW"),
        (["fields", "resnet18", "--layer", "layer1.0.conv1"], 2, "give --heatmap FILE as well"),
        (["fields", "resnet18", "--figure", "x.png", "--heatmap", "x.png"], 2, "x.png cannot be two files"),
        (
            ["fields", "resnet18", "--figure", "x.png", "--layer", "9", "--heatmap", "h.png"],
            1,
            "layer='9': there is no",
        ),
    ],
)
def test_a_mistake_is_one_message(coconv, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    done = coconv(*arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_table_and_times(coconv):
    done = coconv("table", 1, "--time")
    assert done.code == 0, done.err
    plain, contextual = [line.split() for line in done.out.splitlines() if "ResNet-50  " in line]
    assert float(plain[-2]) > 0
    assert plain[-1] == "1.00"
    assert float(contextual[-1]) == pytest.approx(float(contextual[-2]) / float(plain[-2]), abs=0.02)


def test_the_command_knows_seven_tables(coconv):
    code, out, err = coconv("table", 8)
    assert (code, out) == (2, "")
    assert "8 is not in the range 1<=x<=7" in err


def test_sweep_writes_rows_a_page_and_the_table_of_collections(coconv, tmp_path):
    done = coconv("sweep", "timm", "--only", "resnet1[08]t", "--only", "resnet18", "--jobs", 2, "-o", tmp_path)
    assert done.code == 0, done.err
    assert done.out == f"2 networks, 0 with a problem: {tmp_path / 'timm.csv'}, {tmp_path / 'timm.md'}\n"
    assert [row.name for row in read_rows(tmp_path / "timm.csv")] == ["resnet10t", "resnet18"]
    page = (tmp_path / "timm.md").read_text()
    assert "Made by `coconv sweep timm --only 'resnet1[08]t' --only 'resnet18' --jobs 2` with timm" in page
    assert "| [timm](timm.md) | 2 | 2 | 0 | 0 |" in (tmp_path / "index.md").read_text()


def test_sweep_of_nothing_is_one_clear_error(coconv, tmp_path):
    done = coconv("sweep", "timm", "--only", "rsnet*", "-o", tmp_path)
    assert done.code == 1
    assert "timm has no network that matches 'rsnet*'" in done.err


def test_bench_prints_the_table_that_it_writes(coconv, tmp_path, tiny):
    done = coconv("bench", "layers", "--only", "tiny", "--engine", "eager", "--rounds", 2, "-o", tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "layers-eager.md").read_text() in done.out
    assert done.out.count("| tiny |") == 8
    assert {path.name for path in tmp_path.iterdir()} == {"layers-eager.json", "layers-eager.md", "layers-eager.png"}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_convert_goes_by_the_plan_of_a_converted_checkpoint(coconv, tmp_path, suffix):
    model = cs.convert(timm.create_model("resnet18"), cs.StagePolicy((2, 2, 2, 1)))
    path = tmp_path / f"in.{suffix}"
    cs.save_converted(model, path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    assert coconv("convert", "resnet18", "--checkpoint", path, "-o", tmp_path / "out.safetensors").code == 0
    assert cs.read_plan(tmp_path / "out.safetensors") == cs.get_plan(model)
    again = tmp_path / "again.safetensors"
    assert coconv("convert", "resnet18", "--checkpoint", path, "--policy", "stage(3,3,2,1)", "-o", again).code == 0
    assert cs.read_plan(again).policy == "stage(3,3,2,1)"


@pytest.fixture
def photographs(tmp_path):
    """Smooth images in folders within a folder."""
    for number in range(6):
        folder = tmp_path / "images" / f"part{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_convert_calibrates_on_a_folder_of_images_and_the_file_says_so(coconv, tmp_path, photographs):
    output = tmp_path / "net.safetensors"
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "plain.pth")
    start = ("convert", "test_resnet", "--checkpoint", tmp_path / "plain.pth", "-o", output)
    done = coconv(*start, "--input-size", 64, "--calibrate", photographs, "--images", 5)
    assert done.code == 0, done.err
    assert "convolutions solved on 5 images" in done.out
    assert "calibrated on 5 images" in done.out
    assert cs.plan_of(output).calibrated == 5
    model = cs.load_converted(timm.create_model("test_resnet"), output)
    assert cs.get_plan(model).calibrated == 5


def test_convert_keeps_a_networks_own_levels_whatever_weights_it_gets(coconv, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "plain.pth")
    start = ("convert", "coresnet18", "--arg", "levels=(2,2,2,1)", "--checkpoint", tmp_path / "plain.pth")
    for name, asked, levels in (("own", (), 2), ("other", ("--policy", "uniform(3)"), 3)):
        assert coconv(*start, *asked, "-o", tmp_path / f"{name}.safetensors").code == 0
        converted = cs.plan_of(tmp_path / f"{name}.safetensors").converted
        assert {row.name: row.levels for row in converted}["layer1.0.conv1"] == levels


def test_a_plan_is_written_whether_or_not_somebody_reads_what_is_shown(tmp_path):
    command = f"{Path(sys.executable).with_name('coconv')} plan test_resnet --json plan.json --figure plan.svg | true"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.svg"]


def test_weights_that_an_argument_brings_are_not_called_random(coconv, tmp_path, photographs, monkeypatch):
    (tmp_path / "own_made.py").write_text("import timm\ndef make(pretrained): return timm.create_model('test_resnet')")
    monkeypatch.chdir(tmp_path)
    start = ("convert", "own_made:make", "--input-size", 64, "-o", "net.safetensors", "--arg", "pretrained=True")
    done = coconv(*start, "--calibrate", photographs)
    assert done.code == 0, done.err
    assert "random" not in done.err
    assert cs.plan_of("net.safetensors").calibrated == 6


def test_a_hubs_folder_has_random_weights_unless_they_are_asked_for(coconv, tmp_path, photographs):
    timm.models.save_for_hf(
        timm.create_model("test_resnet"), tmp_path / "folder", model_args={}, safe_serialization=True
    )
    start = ("convert", f"local-dir:{tmp_path / 'folder'}", "--input-size", 64, "-o", tmp_path / "net.safetensors")
    assert "the weights are random" in coconv(*start).err
    assert "the weights are random" not in coconv(*start, "--pretrained").err
    refused = coconv(*start, "--calibrate", photographs)
    assert refused.code == 2
    assert "--calibrate needs trained weights" in refused.err


def test_convert_calibrates_plain_weights_alone(coconv, tmp_path, photographs):
    file, empty = tmp_path / "net.safetensors", tmp_path / "empty"
    empty.mkdir()
    cs.save_converted(cs.convert(timm.create_model("test_resnet"), input_size=64), file)
    start = ("convert", "test_resnet", "-o", tmp_path / "out.safetensors")
    refused = coconv(*start, "--checkpoint", file, "--calibrate", photographs)
    assert refused.code == 2
    assert "--calibrate needs plain ones" in refused.err
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "plain.pth")
    plain = ("--checkpoint", tmp_path / "plain.pth")
    assert "has no images to calibrate on" in coconv(*start, *plain, "--calibrate", empty).err
    (empty / "text.jpg").write_text("none")
    assert "text.jpg is no image that can be read" in coconv(*start, *plain, "--calibrate", empty).err
    assert "--calibrate needs trained weights" in coconv(*start, "--calibrate", photographs).err
    assert "give --calibrate FOLDER as well" in coconv(*start, "--images", 8).err
    assert not (tmp_path / "out.safetensors").exists()
