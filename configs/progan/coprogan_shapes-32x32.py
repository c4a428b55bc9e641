_base_ = "./progan_shapes-32x32.py"
model = dict(surgery=dict(policy=dict(type="resolution", split="even")))
