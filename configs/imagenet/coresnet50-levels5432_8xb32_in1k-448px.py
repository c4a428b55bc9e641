# Twice the resolution, for which the rule of Table 1 gives one level more: maps of 112, 56, 28 and 14.
_base_ = "./coresnet50_8xb32_in1k.py"
model = dict(levels=(5, 4, 3, 2))
train_dataloader = dict(dataset=dict(transform=dict(input_size=448)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=448)))
test_dataloader = dict(dataset=dict(transform=dict(input_size=448)))
