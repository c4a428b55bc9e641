# The plain shapes detector, trained by ../shapes/ssd_r18_shapes.py, converted, calibrated, and fine-tuned for 4 epochs.
_base_ = "../shapes/ssd_r18_shapes.py"
load_from = "work_dirs/ssd_r18_shapes/epoch_16.pth"
model = dict(
    type="CoConvSurgery",
    detector_type="SingleStageDetector",
    surgery=dict(input_size={{_base_.input_size}}, calibrate=dict(images=64)),
)

max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
# A tenth of the rate that it was trained with, after 20 iterations of warm-up.
optim_wrapper = dict(optimizer=dict(lr=0.005))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
