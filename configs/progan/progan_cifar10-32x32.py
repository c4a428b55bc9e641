# ProGAN on CIFAR-10 (Table 7): the network for CelebA-HQ as far as 32×32 pixels, as ProGAN's appendix D has it.
_base_ = "./progan_shapes-32x32.py"

model = dict(
    fmap_base=8192,
    fmap_max=512,
    mirror=False,
    smoothing=0.999,
    target=750.0,  # of the gradient's norm, appendix D; the reference implementation's default is 1
    growth=dict(_delete_=True),  # 12 million images, 600,000 for a resolution, as many to fade one in
)

train_dataloader = dict(
    _delete_=True,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(type="CIFAR10Images", root="data/cifar10"),
)
default_hooks = dict(checkpoint=dict(interval=5_000, max_keep_ckpts=3))
custom_hooks = [dict(type="FiniteWeightsHook"), dict(type="SampleGridHook", interval=5_000)]
