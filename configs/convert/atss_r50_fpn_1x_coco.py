_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["coconv_surgery.mmdet"], allow_failed_imports=False)
model = dict(
    type="CoConvSurgery",
    detector_type="ATSS",
    surgery=dict(pipeline={{_base_.test_pipeline}}),
)
default_hooks = dict(coconv_plan=dict(type="CoConvPlanHook"))
