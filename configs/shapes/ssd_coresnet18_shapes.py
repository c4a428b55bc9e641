# The same detector on a CoResNet-18.
_base_ = "./ssd_r18_shapes.py"
model = dict(backbone=dict(type="CoResNet", levels=(4, 3, 2)))
