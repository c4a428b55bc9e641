"""The form of a network for inference and export: plain convolutions, norms folded, nothing that only we know."""

from coconv_surgery.deployment.deploying import deploy, get_deployment
from coconv_surgery.deployment.report import Deployment, DeploymentError

__all__ = ["Deployment", "DeploymentError", "deploy", "get_deployment"]
