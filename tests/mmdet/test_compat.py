"""Repairs of MMDetection's releases."""

from mmdet.models.dense_heads import SSDHead

from coconv_surgery.mmdet import compat


def test_applying_the_repairs_again_changes_nothing():
    before = SSDHead.loss_cls
    compat.apply()
    assert SSDHead.loss_cls is before


def test_an_ssd_head_that_sets_its_loss_is_left_alone(monkeypatch):
    def init(self):
        self.loss_cls = object()

    monkeypatch.delattr(SSDHead, "loss_cls")
    monkeypatch.setattr(SSDHead, "__init__", init)
    compat.give_ssd_head_loss_cls()
    assert not hasattr(SSDHead, "loss_cls")
