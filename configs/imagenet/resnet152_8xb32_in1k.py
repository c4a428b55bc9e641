_base_ = "./resnet50_8xb32_in1k.py"
model = dict(model_name="resnet152")
