_base_ = "./coresnet50_8xb32_in1k.py"
model = dict(levels=(3, 3, 2, 1))
