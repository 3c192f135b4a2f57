"""Register EG-MLA with Transformers' Auto classes; hold the public names of the package."""

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

AutoConfig.register("egmla", EGMLAConfig, exist_ok=True)
AutoModel.register(EGMLAConfig, EGMLAModel, exist_ok=True)
AutoModelForCausalLM.register(EGMLAConfig, EGMLAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(EGMLAConfig, EGMLAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(EGMLAConfig, EGMLAForTokenClassification, exist_ok=True)
