"""Registers the SPCXR classes with the Auto classes of transformers. Importing `spcxr_hf` does it."""

from __future__ import annotations

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto import modeling_auto

from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor, SpcxrImageProcessorPil
from spcxr_hf.modeling.modeling_spcxr import (
    SpcxrBackbone,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
)

MODEL_CLASSES = {
    AutoModel: SpcxrModel,
    AutoModelForPreTraining: SpcxrForPreTraining,
    AutoModelForMaskedImageModeling: SpcxrForPreTraining,
    AutoModelForImageClassification: SpcxrForImageClassification,
    AutoModelForSemanticSegmentation: SpcxrForSemanticSegmentation,
    AutoBackbone: SpcxrBackbone,
}
# The pipelines ask these tables, which `register` of the Auto classes leaves alone; of a class that is not in them they
# say "is not supported", with a list of all that are, and work all the same.
PIPELINE_TABLES = {
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": SpcxrForImageClassification,
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": SpcxrForSemanticSegmentation,
}


def register() -> None:
    """Register `model_type: spcxr` with the Auto classes, and add the code for `trust_remote_code` to every save."""
    AutoConfig.register(SpcxrConfig.model_type, SpcxrConfig, exist_ok=True)
    SpcxrConfig.register_for_auto_class()
    for auto_class, model_class in MODEL_CLASSES.items():
        auto_class.register(SpcxrConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
    for table, model_class in PIPELINE_TABLES.items():
        getattr(modeling_auto, table, {})[SpcxrConfig.model_type] = model_class.__name__
    AutoImageProcessor.register(
        SpcxrConfig,
        image_processor_classes={"torchvision": SpcxrImageProcessor, "pil": SpcxrImageProcessorPil},
        exist_ok=True,
    )
    SpcxrImageProcessor.register_for_auto_class("AutoImageProcessor")
