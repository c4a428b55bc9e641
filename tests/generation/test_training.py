"""Trainings to 16×16 pixels, through two fade-ins, by MMEngine's runner on drawn images."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from PIL import Image

import coconv_surgery as cs
from coconv_surgery.generation.model import ProGAN
from coconv_surgery.generation.sampling import load_grown

NAMES = ("progan_shapes-32x32", "coprogan_shapes-32x32")
STEPS = 12
EVERY_STEP = {"default_hooks.checkpoint.interval": 1}
COPROGAN = {
    "blocks.1.conv0": (1, 2),
    "blocks.1.conv1": (1, 2),
    "blocks.2.conv0": (1, 2, 3),
    "blocks.2.conv1": (1, 2, 3),
}


def saved(runner: Runner, step: int | str = STEPS) -> dict:
    return torch.load(Path(runner.work_dir) / f"iter_{step}.pth", weights_only=True)


def scalars(runner: Runner) -> list[dict]:
    (log,) = Path(runner.work_dir).glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in log.read_text().splitlines()]


def assert_equal(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, list | tuple):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


def test_both_networks_train_through_two_fade_ins_on_the_same_data(trained):
    runners = {name: trained(name, work=name) for name in NAMES}
    for name, runner in runners.items():
        log = scalars(runner)
        assert [(entry["resolution"], entry["fade"]) for entry in log] == [
            *[(4, 1)] * 2,
            *[(8, 0.5), (8, 1)],
            *[(8, 1)] * 2,
            *[(16, 0.5), (16, 1)],
            *[(16, 1)] * 4,
        ]
        assert [entry["kimg"] for entry in log] == [pytest.approx(0.008 * n) for n in range(1, STEPS + 1)]
        assert all(np.isfinite(value) for entry in log for key, value in entry.items() if "loss" in key)
        levels = {row.name: row.dilations for row in cs.get_plan(runner.model.generator).converted}
        assert levels == (COPROGAN if name.startswith("co") else {})
    first = [scalars(runner)[0] for runner in runners.values()]  # at 4×4 pixels there is one level
    for key in ("loss_wasserstein", "loss_penalty", "loss_generator"):
        assert first[0][key] == first[1][key]


def test_what_has_grown_is_trained_and_nothing_else(trained):
    runner = trained(NAMES[1], **EVERY_STEP)
    for step, resolution in ((2, 4), (6, 8), (STEPS, 16)):
        states = [saved(runner, at)["state_dict"] for at in (step - 1, step)]
        networks = [name for name in states[0] if name.startswith(("generator.", "discriminator."))]
        moved = {name for name in networks if not torch.equal(states[0][name], states[1][name])}
        index = resolution.bit_length() - 3
        grown = {name for name in networks if "blocks" in name and int(name.split(".")[2]) <= index}
        assert moved == grown | {name for name in networks if f"rgb.{index}." in name}


@pytest.mark.parametrize("stop", [3, 6, 7, random.Random(20261126).randrange(1, STEPS)])
def test_a_run_that_stops_and_resumes_is_bit_identical(trained, stop):
    whole = trained(NAMES[1], **EVERY_STEP)
    rest = trained(NAMES[1], work="resumed", load_from=str(Path(whole.work_dir) / f"iter_{stop}.pth"), resume=True)
    assert [entry["step"] for entry in scalars(rest)] == list(range(stop + 1, STEPS + 1))
    for key in ("state_dict", "optimizer"):
        assert_equal(saved(whole)[key], saved(rest)[key])
    losses = [[entry["loss_generator"] for entry in scalars(runner)] for runner in (whole, rest)]
    assert losses[0][stop:] == losses[1]


def test_optimizers_start_afresh_with_every_phase(trained):
    runner = trained(NAMES[0], **EVERY_STEP)
    for step, since in ((2, 2), (3, 1), (4, 2), (5, 1), (7, 1), (9, 1), (12, 4)):
        for network in ("generator", "discriminator"):
            states = saved(runner, step)["optimizer"][network]["state"].values()
            assert max(int(state["step"]) for state in states) == since


def test_the_average_follows_the_generator(trained):
    runner = trained(NAMES[1], **{"model.smoothing": 0.75, **EVERY_STEP})
    own, average = "generator.", "average."
    for step in (5, 12):
        before, after = saved(runner, step - 1)["state_dict"], saved(runner, step)["state_dict"]
        for name in (name for name in after if name.startswith(average)):
            expected = 0.75 * before[name] + 0.25 * after[own + name.removeprefix(average)]
            torch.testing.assert_close(after[name], expected)


def test_pictures_are_made_at_the_end_of_every_phase_on_disk_and_in_tensorboard(trained):
    runner = trained(NAMES[1], **{"custom_hooks": [{"type": "SampleGridHook", "images": 9, "interval": 5}]})
    (folder,) = Path(runner.work_dir).glob("*/vis_data")
    names = sorted(path.name for path in (folder / "vis_image").iterdir())
    ends = ["samples-4x4_16", "samples-8x8_32", "samples-8x8_48", "samples-16x16_64", "samples-16x16_96"]
    assert names == sorted(f"{name}.png" for name in ("reals_0", *ends, "samples-8x8_40", "samples-16x16_80"))
    picture = np.asarray(Image.open(folder / "vis_image" / "samples-8x8_48.png"))
    assert picture.shape == (3 * 34 + 2, 3 * 34 + 2, 3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.glob("events.*"))), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["reals", "samples-16x16", "samples-4x4", "samples-8x8"]
    assert [event.step for event in events.Images("samples-16x16")] == [64, 80, 96]


@pytest.mark.parametrize("step", [3, STEPS])
def test_a_checkpoint_gives_back_the_averaged_generator_with_its_levels_and_growth(trained, step):
    runner = trained(NAMES[1], **EVERY_STEP)
    grown = load_grown(Path(runner.work_dir) / f"iter_{step}.pth")
    assert (grown.resolution, grown.fade) == ((8, 0.5) if step == 3 else (16, 1))
    assert grown.images_seen == 8 * step
    assert {row.name: row.dilations for row in cs.get_plan(grown.generator).converted} == COPROGAN
    state = saved(runner, step)["state_dict"]
    assert all(torch.equal(value, state[f"average.{name}"]) for name, value in grown.generator.state_dict().items())
    if step == STEPS:
        latents = torch.randn(2, 8)
        assert torch.equal(grown.generator(latents), runner.model(latents))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.resolution": 8, "train_dataloader.dataset.resolution": 8}, r"not of a GAN of this resolution \(8\)"),
        (
            {"model.fmap_max": 4},
            r"dense.weight is \(8, 8, 4, 4\) there and \(4, 4, 4, 4\) here",
        ),
        ({"model.latent": 5}, "blocks.0.dense.weight is .* latent= and colours= that it was trained with"),
    ],
)
def test_a_checkpoint_of_another_resolution_or_width_is_refused(trained, configured, options, message):
    runner = trained(NAMES[0])
    other = configured(NAMES[0], "other", load_from=str(Path(runner.work_dir) / "iter_12.pth"), **options)
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(other).train()


def test_a_checkpoint_of_the_other_network_is_refused(trained, configured):
    runner = trained(NAMES[1])
    other = configured(NAMES[0], "other", load_from=str(Path(runner.work_dir) / "iter_12.pth"))
    with pytest.raises(cs.PlanError, match="as the checkpoint's was"):
        Runner.from_cfg(other).train()


def test_data_of_another_resolution_are_refused_before_training(configured):
    with pytest.raises(ValueError, match=r"the data set has resolution=32 and colours=3, the model resolution=16"):
        Runner.from_cfg(configured(NAMES[0], **{"train_dataloader.dataset.resolution": 32})).train()


@pytest.mark.parametrize("interval", [1, 100])
def test_weights_that_are_not_finite_end_the_training_and_are_not_saved(configured, tmp_path, interval):
    hooks = [{"type": "FiniteWeightsHook", "interval": interval}]
    runner = Runner.from_cfg(configured(NAMES[0], **{"custom_hooks": hooks, "default_hooks.checkpoint.interval": 5}))
    with torch.no_grad():
        runner.model.discriminator.blocks[0].dense1.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=f"is not finite at step {0 if interval == 1 else 4}: the"):
        runner.train()
    assert not list((tmp_path / "work").glob("iter_*.pth"))


def test_weights_alone_go_on_where_they_stood_and_the_last_step_is_saved(trained):
    first = trained(NAMES[1], **EVERY_STEP)
    rest = trained(NAMES[1], work="rest", load_from=str(Path(first.work_dir) / "iter_5.pth"))
    assert [entry["kimg"] for entry in scalars(rest)] == [pytest.approx(0.008 * n) for n in range(6, STEPS + 1)]
    assert (Path(rest.work_dir) / f"iter_{STEPS - 5}.pth").exists()


def test_what_lies_ahead_may_change_when_a_run_goes_on(trained):
    first = trained(NAMES[1], **EVERY_STEP)
    growth = {"images": 128, "stabilise": 16, "fade": 16, "batches": {"4": 8, "8": 8, "16": 16}}
    resumed = {"load_from": str(Path(first.work_dir) / "iter_9.pth"), "resume": True}
    rest = trained(NAMES[1], work="rest", **resumed, **{"model.growth": growth})
    assert [entry["kimg"] for entry in scalars(rest)] == pytest.approx([0.088, 0.104, 0.12, 0.136])
    assert (Path(rest.work_dir) / "iter_13.pth").exists()


@pytest.mark.parametrize(
    ("growth", "resume", "message"),
    [
        (
            {"stabilise": 48},
            True,
            "stands in phase 4 at 16×16 pixels, where this schedule is in phase 2 at 8×8",
        ),
        ({"fade": 0}, True, "stands in phase 4 at 16×16 pixels, where this schedule is in phase 2 at 16×16"),
        ({}, False, "the checkpoint has seen 96 images, and the schedule has 96: nothing remains"),
    ],
)
def test_a_schedule_that_is_not_that_of_the_checkpoint_is_refused(trained, configured, growth, resume, message):
    first = trained(NAMES[1])
    options = {f"model.growth.{key}": value for key, value in {"images": 200 if growth else 96, **growth}.items()}
    checkpoint = str(Path(first.work_dir) / "iter_12.pth")
    other = configured(NAMES[1], "other", load_from=checkpoint, resume=resume, **options)
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(other).train()


def test_a_finished_run_that_is_resumed_does_nothing(trained):
    first = trained(NAMES[1])
    again = trained(NAMES[1], work="again", load_from=str(Path(first.work_dir) / "iter_12.pth"), resume=True)
    assert not list(Path(again.work_dir).glob("iter_*.pth"))
    assert again.model.images_seen == 96


def test_the_plan_of_a_work_dir_converts_another_model_the_same_way(trained):
    first = trained(NAMES[1])
    surgery = {"plan": str(Path(first.work_dir) / "coconv_plan.json")}
    again = trained(NAMES[0], work="again", **{"model.surgery": surgery})
    assert_equal(saved(first)["state_dict"], saved(again)["state_dict"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "target=0 must be more"),
        ({"penalty": -1}, "penalty=-1 must be at least 0"),
        ({"drift": float("nan")}, "drift=nan must be at least 0"),
        ({"smoothing": 1}, "smoothing=1 must be less than 1"),
        ({"smoothing": "a"}, "smoothing must be a number, not str"),
        ({"surgery": {"calibrate": {"images": 4}}}, "surgery: calibrate is for networks that take images"),
        ({"growth": {"resolution": 8}}, "growth has no key 'resolution'"),
    ],
)
def test_a_wrong_argument_of_the_model_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ProGAN(8, fmap_base=64, **arguments)


def test_a_model_can_be_copied():
    model = ProGAN(8, fmap_base=64, surgery={"policy": {"type": "resolution", "split": "even"}})
    latents = torch.randn(2, 64)
    assert torch.equal(copy.deepcopy(model)(latents), model(latents))


def test_a_network_that_does_not_exist_has_no_optimizer(configured):
    config = configured(NAMES[0], **{"optim_wrapper.critic": {"type": "OptimWrapper"}})
    with pytest.raises(ValueError, match="optim_wrapper: ProGAN has no network 'critic'"):
        Runner.from_cfg(config).train()


# Adam amplifies what is next to zero, rounding included; gradient descent does not.
SGD = {"type": "SGD", "lr": 0.002, "_delete_": True}
PLAIN = {f"optim_wrapper.{network}.optimizer": SGD for network in ("generator", "discriminator")}


def test_two_processes_equal_one_that_has_batches_of_both_and_take_over_from_each_other(trained, launched):
    """Weights after twelve steps agree to 1e-5: sums are taken in another order."""
    one, two = trained(NAMES[1], "1", **PLAIN).work_dir, launched(NAMES[1], "2", **EVERY_STEP, **PLAIN)
    half = {"load_from": f"{two}/iter_7.pth", "resume": True, **PLAIN}
    taken_over, again = trained(NAMES[1], "1-resumed", **half).work_dir, launched(NAMES[1], "2-resumed", **half)
    expected, *others = (torch.load(f"{work}/iter_12.pth")["state_dict"] for work in (one, two, taken_over, again))
    for state in others:
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert_equal(others[0], others[2])
    biases = [value for name, value in expected.items() if name.endswith("bias")]
    assert sum(bool(value.abs().max() > 1e-3) for value in biases) >= 8  # they began at zero


def test_a_step_in_bfloat16_moves_everything(trained, monkeypatch):
    # MMEngine's wrapper refuses to work without a GPU; what it enters there is torch's autocast, which CPUs have.
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    amp = {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
    amp = {f"optim_wrapper.{name}.{k}": v for name in ("generator", "discriminator") for k, v in amp.items()}
    full = scalars(trained(NAMES[1]))
    half = trained(NAMES[1], work="half", **amp)
    assert type(half.optim_wrapper["generator"]).__name__ == "AmpOptimWrapper"
    for entry, like in zip(scalars(half)[:2], full[:2], strict=True):
        assert entry["loss_penalty"] == pytest.approx(like["loss_penalty"], rel=0.1)
        assert entry["loss_penalty"] != like["loss_penalty"]
    assert all(np.isfinite(value) for entry in scalars(half) for key, value in entry.items() if "loss" in key)
    assert all(value.dtype != torch.bfloat16 for value in saved(half)["state_dict"].values())
