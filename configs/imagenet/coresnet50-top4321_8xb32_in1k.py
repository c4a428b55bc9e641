_base_ = "./coresnet50_8xb32_in1k.py"
model = dict(policy="top")  # only the highest dilation of each stage: the counter-example of Table 3
