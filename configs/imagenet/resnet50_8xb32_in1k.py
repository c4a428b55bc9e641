# ResNet-50 on ImageNet: the baseline of Tables 3 and 5 of the CoConv paper, and its recipe.
custom_imports = dict(imports=["coconv_surgery.classification"], allow_failed_imports=False)
default_scope = "mmdet"

model = dict(type="TIMMClassifier", model_name="resnet50", num_classes=1000, zero_init_last=False)

data_root = "data/imagenet/"
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="TIMMImageFolder",
        root=data_root + "train",
        transform=dict(input_size=224, is_training=True, color_jitter=None),  # random resized crop and flip
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="TIMMImageFolder",
        root=data_root + "val",
        transform=dict(input_size=224, crop_pct=0.875),  # the short side to 256, centre crop
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 80], gamma=0.1)
# 8 GPUs with 32 images each
auto_scale_lr = dict(enable=False, base_batch_size=256)

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=100),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="accuracy/top1"),
    coconv_plan=dict(type="CoConvPlanHook"),
)
custom_hooks = [dict(type="NumClassCheckHook"), dict(type="CheckInvalidLossHook"), dict(type="SyncBuffersHook")]
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
