"""EG-MLA for Hugging Face Transformers: importing this package registers the model with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_egmla import EGMLACache
from .configuration_egmla import EGMLAConfig
from .cpu_kernel import load_cpu_kernel
from .modeling_egmla import (
    EGMLAForCausalLM,
    EGMLAForSequenceClassification,
    EGMLAForTokenClassification,
    EGMLAModel,
    EGMLAPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("egmla", EGMLAConfig, exist_ok=True)
AutoModel.register(EGMLAConfig, EGMLAModel, exist_ok=True)
AutoModelForCausalLM.register(EGMLAConfig, EGMLAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(EGMLAConfig, EGMLAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(EGMLAConfig, EGMLAForTokenClassification, exist_ok=True)

__all__ = [
    "EGMLACache",
    "EGMLAConfig",
    "EGMLAForCausalLM",
    "EGMLAForSequenceClassification",
    "EGMLAForTokenClassification",
    "EGMLAModel",
    "EGMLAPreTrainedModel",
    "load_cpu_kernel",
]
