_base_ = "./progan_celeba-128x128.py"
model = dict(surgery=dict(policy=dict(type="resolution", split="even")))
