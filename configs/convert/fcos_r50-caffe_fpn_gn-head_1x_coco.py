_base_ = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"
custom_imports = dict(imports=["coconv_surgery.mmdet"], allow_failed_imports=False)
model = dict(
    type="CoConvSurgery",
    detector_type="FCOS",
    surgery=dict(pipeline={{_base_.test_pipeline}}),
)
default_hooks = dict(coconv_plan=dict(type="CoConvPlanHook"))
