"""The benchmarks measure what they say; how fast things are is theirs to print, not the tests' to assert."""

import copy
import json
import time

import pytest
import torch
import torch.nn as nn
from PIL import Image
from sampling import few

import coconv_surgery as cs
from coconv_surgery.bench import calibration, deployment, speed, surgery
from coconv_surgery.bench.authors import LevelConvs, LevelsAlone, use_authors_layout
from coconv_surgery.bench.memory import Peak, peak_mib
from coconv_surgery.bench.operators import profile_operators
from coconv_surgery.bench.report import save
from coconv_surgery.bench.run import run
from coconv_surgery.bench.speed import SUBJECTS, Case, contender, measure, prepare
from coconv_surgery.bench.surgery import Cost, growth
from coconv_surgery.bench.timing import Ratio, interleave
from coconv_surgery.layers.levels import complete_levels
from coconv_surgery.layers.switch import to_coconv_
from coconv_surgery.planning.plan import count_parameters

CPU = torch.device("cpu")


def test_calls_are_timed_in_turn_in_an_order_that_changes():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(calls, rounds=20, device=CPU, warmup=0)
    rounds = ["".join(order[start : start + 3]) for start in range(0, 60, 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 20, "b": 20, "c": 20}


def test_rounds_to_warm_up_do_not_count():
    order = []
    times = interleave({"a": lambda: order.append("a")}, rounds=2, device=CPU, warmup=3)
    assert (len(order), len(times["a"])) == (5, 2)


def test_a_ratio_pairs_times_of_one_round():
    assert Ratio.of([2.0, 30.0, 400.0, 5.0], [1.0, 10.0, 100.0, 1.0]) == Ratio(3.5, 2.25, 4.75)


def test_a_longer_call_has_the_longer_time():
    times = interleave({"a": lambda: time.sleep(0.001), "b": lambda: time.sleep(0.02)}, rounds=2, device=CPU)
    assert max(times["a"]) < min(times["b"])


@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"groups": 8}, {"stride": 2, "bias": False}], ids=str)
def test_the_authors_layout_computes_the_same(options):
    conv = nn.Conv2d(8, 16, 3, padding=1, **options)
    to_coconv_(conv, *complete_levels(conv, 3))
    image = torch.randn(2, 8, 12, 10)
    layout = LevelConvs(conv)
    torch.testing.assert_close(layout(image), conv(image))
    assert count_parameters(layout) == count_parameters(conv)


@pytest.mark.parametrize("options", [{}, {"groups": 8}], ids=["dense", "depthwise"])
def test_levels_alone_are_the_parts_of_the_output_and_of_the_gradients(options):
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False, **options)
    to_coconv_(conv, *complete_levels(conv, 3))
    image = torch.randn(2, 8, 12, 10, requires_grad=True)
    output, alone = conv(image), LevelsAlone(conv)
    parts = alone(image)
    torch.testing.assert_close(torch.cat(parts, 1), output)
    output.sum().backward()
    torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
    gradients = [part.grad for part in alone.parts]
    whole = torch.cat(gradients, 1) if options else sum(gradients)
    torch.testing.assert_close(whole, image.grad)


def test_a_network_in_the_authors_layout_has_no_contextual_convolution_left(net, image):
    cs.convert(net, input_size=32)
    expected = net(image)
    use_authors_layout(net)
    assert not any(isinstance(module, cs.CoConv2d) for module in net.modules())
    torch.testing.assert_close(net(image), expected)


@pytest.mark.parametrize("name", few(SUBJECTS, 7))
def test_every_subject_builds_with_as_many_parameters_plain_and_contextual(name):
    plain, contextual, authors = (contender(SUBJECTS[name], which) for which in ("plain", "coconv", "authors"))
    assert count_parameters(plain) == count_parameters(contextual) == count_parameters(authors)
    assert any(isinstance(module, cs.CoConv2d) for module in contextual.modules())
    assert not any(isinstance(module, cs.CoConv2d) for module in plain.modules())


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_leaves_gradients_in_the_layout_asked_for(layout, precision, tiny):
    model = contender(tiny, "coconv")
    prepare(model, tiny, Case("tiny", "train", layout, precision, "eager"), CPU)()
    assert model.weight.grad.abs().sum() > 0
    assert model.weight.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_an_evaluation_leaves_no_gradients(tiny):
    model = contender(tiny, "coconv")
    prepare(model, tiny, Case("tiny", "eval", "NCHW", "fp32", "eager"), CPU)()
    assert model.weight.grad is None
    assert not model.training


def test_a_case_is_measured_and_written_as_json_table_and_picture(tiny, tmp_path):
    timing = measure(Case("tiny", "eval", "NCHW", "fp32", "eager"), CPU, rounds=4)
    for ratio in (timing.coconv, timing.authors, timing.alone):
        assert ratio.low <= ratio.median <= ratio.high
    files = save(tmp_path, "layers", CPU, "coconv bench layers", timings=[timing], memory=[Peak("tiny", 1.01, 1.02)])
    data = json.loads(files.data.read_text())
    assert data["timings"][0]["case"]["subject"] == "tiny"
    assert torch.__version__.startswith(data["machine"]["torch"])
    assert "| tiny | eval | NCHW | fp32 | eager |" in files.page.read_text()
    assert "| tiny | 1.010 | 1.020 |" in files.page.read_text()
    assert "| levels alone |" in files.page.read_text()
    assert Image.open(files.picture).size > (300, 100)


def test_a_table_has_no_column_for_levels_that_were_not_timed_alone(tmp_path):
    ratio = Ratio(1.0, 0.9, 1.1)
    timing = speed.Timing(Case("tiny", "eval", "NCHW", "fp32", "compile"), 2.0, ratio, ratio)
    table = save(tmp_path, "layers", CPU, "coconv bench layers", timings=[timing]).page.read_text()
    assert table.splitlines()[-1] == (
        "| tiny | eval | NCHW | fp32 | compile | 2.00 | 1.00 (0.90–1.10) | 1.00 (0.90–1.10) |"
    )
    assert "levels alone" not in table


def test_the_operators_that_cost_the_difference_are_told(tiny, tmp_path):
    case = Case("tiny", "eval", "NCHW", "fp32", "eager")
    rows = profile_operators(case, CPU, rounds=3)
    assert ("aten::cat", 0, 0.0, 1) in {(row.name, row.plain, row.plain_ms, row.contextual) for row in rows}
    differences = [abs(row.contextual_ms - row.plain_ms) for row in rows]
    assert differences == sorted(differences, reverse=True)
    page = save(tmp_path, "networks", CPU, "coconv bench networks", operators=rows).page.read_text()
    assert "| tiny | eval | NCHW | aten::cat | 0 | 0.00 | 1 |" in page


def test_only_chosen_subjects_are_run_and_the_files_say_by_which_engine(tiny, tmp_path):
    files = run("layers", tmp_path, only="tiny", engines=["eager"], rounds=2)
    assert [path.name for path in files] == ["layers-eager.json", "layers-eager.md", "layers-eager.png"]
    data = json.loads(files.data.read_text())
    assert data["command"] == "coconv bench layers --engine eager --only 'tiny' --rounds 2"
    assert len(data["timings"]) == 8
    with pytest.raises(ValueError, match=r"no benchmark of layers matches 'vgg\*': choose from .*tiny"):
        run("layers", tmp_path, only="vgg*")


def test_surgery_is_measured_in_a_process_of_its_own(tmp_path):
    cost = surgery.measure("100 convs in a row", repeats=2)
    assert cost.convs == 100
    assert cost.plan_s > 0
    files = save(tmp_path, "surgery", CPU, "coconv bench surgery", costs=[cost])
    assert "| 100 convs in a row | 100 |" in files.page.read_text()


def test_peak_memory_of_a_step_is_that_of_the_step_alone():
    ballast = torch.ones(2**26)  # 256 MiB that are not the step's
    case = Case("128 at 28×28, 3 levels", "train", "NCHW", "fp32", "eager")
    peaks = [peak_mib(case, "coconv", CPU) for _ in range(2)]
    assert ballast.numel()
    assert 8 * 128 * 28 * 28 * 4 / 2**20 < peaks[0] < 200
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_linear_growth_is_one_and_takes_both_networks():
    costs = [Cost(f"{n} convs in a row", n, 0.0, n / 500, 1.0, 1.0) for n in (100, 1000)]
    assert growth(costs) == pytest.approx(1.0)
    assert growth(costs[1:]) is None


def test_calibration_is_measured_in_seconds_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "MODELS", ("test_resnet",))
    monkeypatch.setattr(calibration, "_SIDE", 64)
    cost = calibration._measure("test_resnet", torch.get_num_threads(), keep=True)
    assert cost.convs > 0
    page = save(tmp_path, "calibration", CPU, "coconv bench calibration", calibrations=[cost]).page.read_text()
    assert f"| test_resnet | {cost.convs} |" in page


def test_a_deployed_network_is_profiled_by_the_operations_that_it_has_more_of(tmp_path, monkeypatch):
    plain = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 32, 1)).eval()
    pair = plain, cs.convert(copy.deepcopy(plain), input_size=32)
    monkeypatch.setitem(deployment.NETWORKS, "tiny", (lambda: pair, (1, 3, 32, 32)))
    rows = deployment.profile("tiny", rounds=3)
    assert {(row.kind, row.output, row.plain, row.contextual) for row in rows} == {
        ("Conv", (1, 64, 32, 32), 1, 0),
        ("Conv", (1, 16, 32, 32), 0, 4),
        ("Concat", (1, 64, 32, 32), 0, 1),
    }
    assert all((row.contextual_ms > 0) == (row.contextual > 0) for row in rows)
    page = save(tmp_path, "deploy", CPU, "coconv bench deploy", operations=rows).page.read_text()
    assert "| tiny | Conv | 1×16×32×32 | 0 | 0.00 | 4 |" in page
