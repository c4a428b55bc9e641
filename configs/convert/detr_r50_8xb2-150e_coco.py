_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["coconv_surgery.mmdet"], allow_failed_imports=False)
model = dict(
    type="CoConvSurgery",
    detector_type="DETR",
    surgery=dict(pipeline={{_base_.test_pipeline}}),
)
default_hooks = dict(coconv_plan=dict(type="CoConvPlanHook"))
