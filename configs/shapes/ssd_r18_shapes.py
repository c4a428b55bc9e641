# The same detector on a plain ResNet-18.
_base_ = "./ssd_coresnet18_shapes.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=18,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 1),
        out_indices=(2,),
        base_channels=32,
        norm_eval=False,
    ),
)
