"""SPCXR: a chest X-ray foundation model in the Hugging Face ecosystem. Importing it registers the Auto classes."""

from importlib.metadata import PackageNotFoundError, version

from .auto import register
from .errors import SpcxrError
from .modeling.configuration_spcxr import SpcxrConfig
from .modeling.image_processing_spcxr import SpcxrImageProcessor, SpcxrImageProcessorPil
from .modeling.modeling_spcxr import (
    SpcxrBackbone,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
    SpcxrPreTrainedModel,
)
from .radiograph import read_radiograph

register()

try:
    __version__ = version("spcxr-hf")
except PackageNotFoundError:  # a bare checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "SpcxrBackbone",
    "SpcxrConfig",
    "SpcxrError",
    "SpcxrForImageClassification",
    "SpcxrForPreTraining",
    "SpcxrForSemanticSegmentation",
    "SpcxrImageProcessor",
    "SpcxrImageProcessorPil",
    "SpcxrModel",
    "SpcxrPreTrainedModel",
    "__version__",
    "read_radiograph",
]
