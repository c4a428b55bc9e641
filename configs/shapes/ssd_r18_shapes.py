# SSD on a small ResNet-18, trained from scratch on the drawn shapes of coconv_surgery.demo.shapes.
_base_ = ["mmdet::_base_/models/ssd300.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["coconv_surgery.mmdet"], allow_failed_imports=False)

data_root = "data/shapes/"
classes = ("disc", "ringed disc", "square", "ringed square", "triangle", "ringed triangle")
input_size = 192
max_epochs = 16

channels = (128, 128, 128)
model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
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
    neck=dict(
        in_channels=channels[:1],
        out_channels=channels,
        level_strides=(2, 2),
        level_paddings=(1, 1),
        l2_norm_scale=None,
        norm_cfg=dict(type="BN"),
    ),
    bbox_head=dict(
        in_channels=channels,
        num_classes=len(classes),
        anchor_generator=dict(
            input_size=input_size,
            strides=[8, 16, 32],
            min_sizes=[16, 32, 48],
            max_sizes=[32, 48, 64],
            ratios=[[2], [2], [2]],
        ),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(input_size, input_size), keep_ratio=False),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(input_size, input_size), keep_ratio=False),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(**dataset, ann_file="annotations/train.json", data_prefix=dict(img="train/"), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/val.json", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=16), coconv_plan=dict(type="CoConvPlanHook"))
custom_hooks = [dict(type="NumClassCheckHook"), dict(type="CheckInvalidLossHook", interval=16)]
randomness = dict(seed=0)
