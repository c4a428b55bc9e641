# ProGAN on drawn shapes: small, for trying it out. `coconv shapes data/shapes64 --train 2048 --val 512 --size 64` draws
# the images, of whose middles it learns.
custom_imports = dict(imports=["coconv_surgery.generation.training"], allow_failed_imports=False)

model = dict(
    type="ProGAN",
    resolution=32,
    fmap_base=256,
    fmap_max=64,
    mirror=True,
    smoothing=0.99,  # for a few thousand steps
    growth=dict(images=48_000, stabilise=6_000, fade=6_000, batches={4: 8, 8: 8, 16: 8, 32: 8}),
)

train_dataloader = dict(
    num_workers=0,
    dataset=dict(type="FolderImages", root="data/shapes64/train", resolution=32, crop=(16, 16, 32, 32)),
)
train_cfg = dict(type="GrowingTrainLoop")

# Section 5.1 of the CoConv paper, which follows ProGAN's.
adam = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=1e-3, betas=(0.0, 0.99), eps=1e-8))
optim_wrapper = dict(constructor="EachNetworkConstructor", generator=adam, discriminator=adam)
# Each network by itself; what has not grown yet gets no gradient.
model_wrapper_cfg = dict(type="MMSeparateDistributedDataParallel", find_unused_parameters=True)

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500, max_keep_ckpts=2),
    coconv_plan=dict(type="CoConvPlanHook"),
)
custom_hooks = [dict(type="FiniteWeightsHook"), dict(type="SampleGridHook")]
log_processor = dict(by_epoch=False)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
randomness = dict(seed=0)
