_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
custom_imports = dict(imports=["coconv_surgery.mmdet"], allow_failed_imports=False)
model = dict(
    type="CoConvSurgery",
    detector_type="RTMDet",
    surgery=dict(pipeline={{_base_.test_pipeline}}),
)
default_hooks = dict(coconv_plan=dict(type="CoConvPlanHook"))
