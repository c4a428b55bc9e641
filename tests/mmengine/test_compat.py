"""Repairs of mmengine's releases."""

import io
import os
from pathlib import Path

import mmengine.dist.utils as dist_utils
import mmengine.model.efficient_conv_bn_eval as conv_bn_eval
import mmengine.runner.runner
import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner import save_checkpoint

from coconv_surgery.mmengine import compat


class Reads:
    """Pickles as a call of getattr."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def reload(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_applying_the_repairs_again_changes_nothing():
    before = conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model, dist_utils._init_dist_pytorch
    compat.apply()
    assert (conv_bn_eval.turn_on_efficient_conv_bn_eval_for_single_model, dist_utils._init_dist_pytorch) == before


def test_the_launcher_is_upstreams_for_other_backends(monkeypatch):
    calls = []
    monkeypatch.setattr(
        compat, "_upstream_init_dist_pytorch", lambda backend, **options: calls.append((backend, options))
    )
    dist_utils.init_dist("pytorch", backend="nccl")
    assert calls == [("nccl", {"init_backend": "torch"})]


def test_the_safe_loader_reads_a_log_history():
    history = HistoryBuffer([0.5, 0.25], [1, 2])
    again = reload({"loss": history})["loss"]
    assert again.data[0].tolist() == [0.5, 0.25]
    assert again.mean() == history.mean()


@pytest.mark.parametrize(("owner", "name"), [(str, "upper"), (HistoryBuffer, "__init__"), (HistoryBuffer, "update")])
def test_the_safe_loader_reads_no_other_attribute(owner, name):
    with pytest.raises(Exception, match=r"only refer to the statistics|Unsupported global|not allowed"):
        reload(Reads(owner, name))


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "epoch_1.pth"
    save_checkpoint({"state_dict": {"x": torch.ones(3)}}, str(path))
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: self.open("wb").write(content[:10]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint({"state_dict": {"x": torch.zeros(3)}}, str(path))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "epoch_2.p", "{}/epoch_7.pth"])
def test_where_last_checkpoint_names_no_file_the_latest_is_resumed_from(tmp_path, content):
    (tmp_path / "last_checkpoint").write_text(content.format(tmp_path))
    assert mmengine.runner.runner.find_latest_checkpoint(str(tmp_path)) is None
    for epoch in (9, 10):
        (tmp_path / f"epoch_{epoch}.pth").touch()
        os.utime(tmp_path / f"epoch_{epoch}.pth", (epoch, epoch))
    (tmp_path / "best_coco_bbox_mAP_epoch_10.pth").touch()
    assert mmengine.runner.runner.find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "epoch_10.pth")
