"""The hook that guards the plan of a converted detector."""

import json

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from coconv_surgery import Plan, PlanError, get_plan
from coconv_surgery.mmengine.hooks import FILE_NAME, META_KEY

LEVELS = "model.backbone.levels"


class Stop(Hook):
    """Ends training before its first iteration."""

    def before_train_epoch(self, runner):
        raise KeyboardInterrupt


@pytest.fixture
def runner(tiny_ssd, tmp_path):
    """Build a runner of the tiny SSD, with some options changed."""
    count = iter(range(100))

    def build(**options) -> Runner:
        config = tiny_ssd.copy()
        run = f"run{next(count)}"
        config.experiment_name = f"{tmp_path.name}-{run}"  # mmengine shares a logger among equal names
        config.merge_from_dict({"work_dir": str(tmp_path / run), **options})
        return Runner.from_cfg(config)

    return build


@pytest.fixture
def log(tmp_path):
    """Read what a runner has logged."""

    def read(run: int) -> str:
        (path,) = (tmp_path / f"run{run}").glob("*/*.log")
        return path.read_text()

    return read


@pytest.fixture
def checkpoint(runner, tmp_path):
    """A checkpoint of the tiny SSD with its default levels."""
    source = runner()
    state = {"state_dict": source.model.state_dict(), "meta": {}}
    source.call_hook("before_save_checkpoint", checkpoint=state)
    torch.save(state, tmp_path / "converted.pth")
    return str(tmp_path / "converted.pth")


def test_the_plan_is_logged_and_written_into_the_work_dir(runner, log, tmp_path):
    training = runner()
    training.register_hook(Stop())
    with pytest.raises(KeyboardInterrupt):
        training.train()
    plan = get_plan(training.model)
    assert Plan.from_json(tmp_path / "run0" / FILE_NAME) == plan
    assert plan.summary() in log(0)


def test_the_plan_is_in_a_checkpoints_meta_and_the_safe_loader_reads_it(checkpoint, runner):
    meta = torch.load(checkpoint, weights_only=True)["meta"]
    assert json.loads(meta[META_KEY])["format"] == "coconv-plan"
    assert not Plan.from_json(meta[META_KEY]).diff(get_plan(runner().model))


def test_a_checkpoint_of_the_same_plan_loads(checkpoint, runner):
    runner().load_checkpoint(checkpoint, strict=True)


def test_a_checkpoint_of_another_plan_is_refused_with_the_rows_and_the_switch(checkpoint, runner):
    other = runner(**{LEVELS: (4, 2, 2)})
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(PlanError) as error:
        other.load_checkpoint(checkpoint)
    assert "backbone.layer2.0.conv1: dilations 1, 2, 3" in str(error.value)
    assert "layer1" not in str(error.value)
    assert "strict=False" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())


def test_not_strict_it_only_warns(checkpoint, runner, log):
    other = runner(**{LEVELS: (4, 2, 2), "default_hooks.coconv_plan.strict": False})
    other.load_checkpoint(checkpoint)
    assert "WARNING - the network is not converted as" in log(1)
    weights = torch.load(checkpoint)["state_dict"]
    assert torch.equal(other.model.state_dict()["backbone.conv1.weight"], weights["backbone.conv1.weight"])


def test_a_converted_checkpoint_is_refused_by_a_plain_network(checkpoint, runner):
    plain = runner(**{LEVELS: (1, 1, 1)})
    assert not get_plan(plain.model).converted
    with pytest.raises(PlanError, match=r"backbone\.layer1\.0\.conv1"):
        plain.load_checkpoint(checkpoint)


def test_a_checkpoint_of_a_plain_network_loads_into_a_converted_one(runner, log, tmp_path):
    plain = runner(**{LEVELS: (1, 1, 1)})
    state = {"state_dict": plain.model.state_dict(), "meta": {}}
    plain.call_hook("before_save_checkpoint", checkpoint=state)
    assert META_KEY not in state["meta"]
    torch.save(state, tmp_path / "plain.pth")
    converted = runner()
    converted.load_checkpoint(str(tmp_path / "plain.pth"), strict=True)
    assert "weights of a plain network need fine-tuning" in log(1)


def test_fine_tuning_with_other_classes_is_no_difference(checkpoint, runner):
    runner(**{"model.bbox_head.num_classes": 2}).load_checkpoint(checkpoint)
