_base_ = "./progan_cifar10-32x32.py"
model = dict(surgery=dict(policy=dict(type="resolution", split="even")))
