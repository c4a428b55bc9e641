# timm's ResNet-50 with its pretrained weights, converted, calibrated, and fine-tuned for 5 epochs. Not trained here.
_base_ = "../imagenet/resnet50_8xb32_in1k.py"
model = dict(pretrained=True, surgery=dict(input_size=224, calibrate=dict(images=256)))

max_epochs = 5
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
