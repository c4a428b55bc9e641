"""Training survives a kill at any moment."""

import os
import random
import time

import pytest
import torch
from launching import start

TIMEOUT = 600
# Files are written in parts, so that a kill is likely to find one half written.
SLOWLY = """
import time
from pathlib import Path


def write_bytes(self, content):
    with self.open("wb") as file:
        for start in range(0, len(content), 2**17):
            file.write(content[start : start + 2**17])
            file.flush()
            time.sleep(0.02)


Path.write_bytes = write_bytes
"""


class Training:
    """mmdet's training of the tiny SSD in a process of its own, on one thread."""

    def __init__(self, train, config, folder, epochs):
        config.merge_from_dict(
            {
                "train_cfg.max_epochs": epochs,
                # Workers are seeded at the start of an epoch: what they draw does not depend on the epochs before.
                "train_dataloader.num_workers": 1,
                "train_dataloader.persistent_workers": False,
                "randomness": {"seed": 3, "deterministic": True},
                "default_hooks.checkpoint.max_keep_ckpts": 2,
                "custom_imports.imports": ["coconv_surgery.mmdet", "slowly"],
                "val_cfg": None,
                "val_dataloader": None,
                "val_evaluator": None,
            }
        )
        self.train, self.config, self.output = train, folder / "config.py", folder / "output.txt"
        config.dump(self.config)
        (folder / "slowly.py").write_text(SLOWLY)

    def start(self, work):
        self.output.unlink(missing_ok=True)
        return start(self.train, self.config, "--work-dir", work, "--resume", output=self.output)

    def finish(self, work):
        """Train to the end, and give what it prints."""
        process = self.start(work)
        process.join(TIMEOUT)
        assert process.exitcode == 0, self.output.read_text()[-3000:]
        return self.output.read_text()

    def kill(self, work, seconds):
        """Start, kill some seconds after an iteration with a checkpoint behind it, and see that none is half a one.

        Returns:
            Whether there was still something to kill.
        """
        logs = len(list(work.glob("*/vis_data/scalars.json")))

        def has_begun():
            return len(list(work.glob("*/vis_data/scalars.json"))) > logs and (work / "last_checkpoint").exists()

        process = self.start(work)
        deadline = time.monotonic() + TIMEOUT
        while not has_begun() and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(seconds)
        killed = process.is_alive()
        os.killpg(process.pid, 9) if killed else None
        process.join()
        assert process.exitcode == (-9 if killed else 0), self.output.read_text()[-3000:]
        for path in work.glob("*.pth"):
            assert torch.load(path, weights_only=True)["meta"]["epoch"] == int(path.stem.removeprefix("epoch_"))
        return killed


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_training_that_is_killed_ends_where_an_uninterrupted_one_does(tools, tiny_ssd, tmp_path, monkeypatch, kills):
    monkeypatch.syspath_prepend(tmp_path)
    epochs = 6 + 2 * kills
    training = Training(tools / "train.py", tiny_ssd, tmp_path, epochs)
    training.finish(tmp_path / "whole")
    moments = random.Random(2)
    killed = [training.kill(tmp_path / "killed", moments.uniform(0, 2)) for _ in range(kills)]
    assert "resumed epoch: " in training.finish(tmp_path / "killed")
    assert sum(killed) >= kills / 2
    whole, resumed = (
        torch.load(tmp_path / name / f"epoch_{epochs}.pth", weights_only=True) for name in ("whole", "killed")
    )
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    assert all(torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    momenta = [[state["momentum_buffer"] for state in end["optimizer"]["state"].values()] for end in (whole, resumed)]
    assert all(map(torch.equal, *momenta))
