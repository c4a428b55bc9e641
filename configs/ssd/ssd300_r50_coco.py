# SSD300 on a ResNet-50 that is cut after its third stage: the baseline of Table 6 of the CoConv paper, and its recipe.
_base_ = "mmdet::ssd/ssd300_coco.py"
custom_imports = dict(imports=["coconv_surgery.mmdet"], allow_failed_imports=False)

channels = (1024, 512, 512, 256, 256, 256)
model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=50,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 1),
        out_indices=(2,),
        norm_eval=False,
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(
        in_channels=channels[:1],
        out_channels=channels,
        level_strides=(2, 2, 2, 1, 1),
        level_paddings=(1, 1, 1, 0, 0),
        l2_norm_scale=None,
        norm_cfg=dict(type="BN"),
    ),
    bbox_head=dict(in_channels=channels),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="MinIoURandomCrop", min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3),
    dict(type="Resize", scale=(300, 300), keep_ratio=False),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="PhotoMetricDistortion",
        brightness_delta=32,
        contrast_range=(0.5, 1.5),
        saturation_range=(0.5, 1.5),
        hue_delta=18,
    ),
    dict(type="PackDetInputs"),
]
# 8 GPUs with 32 images each
train_dataloader = dict(batch_size=32, num_workers=4, dataset=dict(times=1, dataset=dict(pipeline=train_pipeline)))
auto_scale_lr = dict(base_batch_size=256)

max_epochs = 130
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, begin=0, end=1, convert_to_iter_based=True),
    dict(type="MultiStepLR", begin=0, end=max_epochs, milestones=[86, 108], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(interval=5), coconv_plan=dict(type="CoConvPlanHook"))
