_base_ = "./coresnet50_8xb32_in1k.py"
model = dict(levels=(1, 1, 1, 1))
