_base_ = "./ssd300_r50_coco.py"
model = dict(backbone=dict(type="CoResNet", levels=(4, 3, 2)))
