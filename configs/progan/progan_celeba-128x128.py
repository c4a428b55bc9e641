# ProGAN on CelebA's aligned images (Table 7). The widths are those of Table 2's rows; model.fmap_base=16384 gives those
# of its totals.
_base_ = "./progan_cifar10-32x32.py"

model = dict(resolution=128, mirror=True, target=1.0)

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="FolderImages",
        root="data/celeba/img_align_celeba",
        resolution=128,
        crop=(57, 25, 128, 128),  # the reference implementation's
    ),
)
