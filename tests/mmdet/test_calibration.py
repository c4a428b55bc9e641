"""A detector that is calibrated before its training, through mmdet's runner and tools."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

import coconv_surgery as cs
import coconv_surgery.classification
from coconv_surgery.mmdet import example_inputs
from coconv_surgery.mmengine import CoConvCalibrationHook
from coconv_surgery.mmengine.options import wished_calibration


@pytest.fixture
def plain(tiny_plain_ssd, plain_checkpoint) -> Config:
    """The plain detector, and a checkpoint of it to start from."""
    tiny_plain_ssd.load_from = str(plain_checkpoint)
    return tiny_plain_ssd


@pytest.fixture
def wished(plain) -> Config:
    """The same converted, and to be calibrated before it is fine-tuned."""
    plain.model.update(
        type="CoConvSurgery",
        detector_type="SingleStageDetector",
        surgery={"input_size": 192, "calibrate": {"images": 6}},
    )
    plain.optim_wrapper.optimizer.lr = 0.0
    return plain


def log_of(runner) -> str:
    return (Path(runner.log_dir) / f"{runner.timestamp}.log").read_text()


def test_a_training_starts_from_calibrated_weights_and_says_so_in_its_checkpoints(wished):
    runner = Runner.from_cfg(wished)
    assert sum(isinstance(hook, CoConvCalibrationHook) for hook in runner.hooks) == 1
    runner.train()
    assert "convolutions solved on 6 images" in log_of(runner)
    checkpoint = torch.load(Path(wished.work_dir) / "epoch_1.pth", weights_only=False)
    assert json.loads(checkpoint["meta"]["coconv_plan"])["calibrated"] == 6
    assert cs.plan_of(Path(wished.work_dir) / "epoch_1.pth").calibrated == 6
    trained = torch.load(wished.load_from, weights_only=False)["state_dict"]
    changed = [name for name, value in checkpoint["state_dict"].items() if not torch.equal(value, trained[name])]
    assert {f"{row.name}.weight" for row in cs.get_plan(runner.model).converted} <= set(changed)


def test_a_training_that_goes_on_is_not_calibrated_again(wished):
    Runner.from_cfg(wished).train()
    wished.train_cfg.max_epochs = 2
    wished.resume, wished.load_from = True, None
    runner = Runner.from_cfg(wished)
    runner.train()
    assert "convolutions solved" not in log_of(runner)
    assert cs.get_plan(runner.model).calibrated == 6


def test_weights_that_were_calibrated_are_left_alone(wished, tmp_path):
    Runner.from_cfg(wished).train()
    wished.load_from, wished.work_dir = str(Path(wished.work_dir) / "epoch_1.pth"), str(tmp_path / "again")
    runner = Runner.from_cfg(wished)
    runner.train()
    assert "as they were calibrated on 6 images" in log_of(runner)
    assert cs.get_plan(runner.model).calibrated == 6


def test_averages_of_the_weights_start_from_the_calibrated_ones(wished):
    wished.custom_hooks.append({"type": "EMAHook", "momentum": 1e-6})
    runner = Runner.from_cfg(wished)
    runner.train()
    (average,) = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    for name, value in average.named_parameters():
        torch.testing.assert_close(value, runner.model.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_the_training_draws_the_batches_that_it_draws_without(wished):
    def first_batches(config):
        runner = Runner.from_cfg(config)
        runner.call_hook("before_run")
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner.load_or_resume()
        runner.call_hook("before_train")
        return [batch["inputs"] for batch in runner.train_dataloader], runner

    with_it, runner = first_batches(copy.deepcopy(wished))
    assert cs.get_plan(runner.model).calibrated == 6
    del wished.model.surgery["calibrate"]
    without, _ = first_batches(wished)
    for one, other in zip(with_it, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_detector_is_calibrated_on_what_its_data_loader_gives(plain):
    runner = Runner.from_cfg(plain)
    runner.load_or_resume()
    model = cs.convert(runner.model, example_inputs=example_inputs(runner.model, (192, 192)))
    report = cs.calibrate(model, Runner.build_dataloader(plain.train_dataloader))
    assert report.images == 8
    assert len(report.solved) == len(cs.get_plan(model).converted)
    assert all(layer.after <= layer.before for layer in report.solved)


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        ({"image": 6}, "image"),
        ({"images": 0}, "surgery: calibrate: images"),
        ({"arrange": 1}, "surgery: calibrate: arrange"),
        (6, "surgery: calibrate"),
    ],
)
def test_a_wrong_wish_is_one_clear_error_when_the_detector_is_built(wished, calibrate, message):
    wished.model.surgery["calibrate"] = calibrate
    with pytest.raises((TypeError, ValueError), match=message):
        Runner.from_cfg(wished)


@pytest.mark.parametrize("name", ["ssd_r18-calibrated_shapes", "resnet50-calibrated_8xb32_in1k"])
def test_a_recipe_builds_a_converted_network_that_is_to_be_calibrated(configs, name):
    config = Config.fromfile(configs / "finetune" / f"{name}.py")
    config.model.pop("pretrained", None)  # a download
    model = MODELS.build(config.model)
    assert any(isinstance(module, cs.CoConv2d) for module in model.modules())
    assert wished_calibration(model).images in (64, 256)
