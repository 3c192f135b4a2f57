"""The test cases that `test_transformers_suite.py` offers to pytest: upstream's mixins on EG-MLA's classes.

This module only says what upstream cannot know: tiny configurations, the classes, and how the gate is exercised.
"""

import inspect
import unittest
from unittest import mock

import torch
from transformers import initialization as init
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.testing_utils import torch_device
from transformers.utils import TransformersKwargs
from upstream_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from upstream_tests.generation.test_utils import GenerationTesterMixin
from upstream_tests.test_configuration_common import ConfigTester
from upstream_tests.test_fsdp_mixin import FSDPTesterMixin
from upstream_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from upstream_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from upstream_tests.test_training_mixin import TrainingTesterMixin

from egmla import (
    EGMLAConfig,
    EGMLAForCausalLM,
    EGMLAForSequenceClassification,
    EGMLAForTokenClassification,
    EGMLAModel,
)
from egmla.modeling_egmla import EGMLAGateNorm


# Upstream finds out what a class is by its name in these tables, which `Auto*.register` does not fill.
AUTO_NAMES = {
    "MODEL_MAPPING_NAMES": "EGMLAModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "EGMLAForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "EGMLAForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "EGMLAForTokenClassification",
}


def random_gate(norm: EGMLAGateNorm) -> None:
    """Instead of the identity a gate starts from: a missing or a wrong gate then changes the numbers of every test."""
    init.normal_(norm.weight, mean=0.0, std=1.0)
    init.normal_(norm.bias, mean=1.0, std=0.1)


class EGMLAModelTester:
    """Tiny models and inputs, in the form upstream's mixins ask for."""

    base_model_class = EGMLAModel
    causal_lm_class = EGMLAForCausalLM
    sequence_classification_class = EGMLAForSequenceClassification
    token_classification_class = EGMLAForTokenClassification
    all_model_classes = (EGMLAModel, EGMLAForCausalLM, EGMLAForSequenceClassification, EGMLAForTokenClassification)

    is_training = True
    batch_size = 13
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase, **config_kwargs):
        self.parent = parent
        self.config_kwargs = config_kwargs
        self.give_gate_ids = False

    def get_config(self) -> EGMLAConfig:
        # All widths of a head differ, so that none can stand in for another unnoticed.
        shape = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "max_position_embeddings": 512,
            # Some tests damp norms with an epsilon of 1: with the default, small weights every gate would be the same.
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return EGMLAConfig(**(shape | self.config_kwargs))

    def prepare_config_and_inputs_for_common(self) -> tuple[EGMLAConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        lengths = torch.arange(self.batch_size, device=torch_device) % self.seq_length + 1
        mask = torch.arange(self.seq_length, device=torch_device) < lengths.unsqueeze(1)
        inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
        if self.give_gate_ids:
            inputs["kv_gate_input_ids"] = input_ids
        return self.get_config(), inputs


class EGMLAModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    unittest.TestCase,
):
    """The default model: each gate reads the input embedding. Sharded training is tested with the other one."""

    all_model_classes = EGMLAModelTester.all_model_classes
    model_tester = None  # abstract in two of the mixins; made anew for each test
    config_kwargs = {}
    _torch_compile_train_cls = EGMLAForCausalLM

    def setUp(self):
        super().setUp()
        self.model_tester = EGMLAModelTester(self, **self.config_kwargs)
        self.config_tester = ConfigTester(self, config_class=EGMLAConfig, hidden_size=36)
        for table, name in AUTO_NAMES.items():
            self.use(mock.patch.dict(getattr(modeling_auto, table), egmla=name))
        # Upstream looks for `output_attentions` in this annotation, which its generic heads spell as a string.
        for model_class in (EGMLAForSequenceClassification, EGMLAForTokenClassification):
            annotations = inspect.unwrap(model_class.forward).__annotations__
            self.use(mock.patch.dict(annotations, kwargs=Unpack[TransformersKwargs]))
        # Upstream runs these on a few models only, to save time; a model of this project is to be checked.
        self.use(mock.patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", {"egmla"}))
        self.use(mock.patch.object(test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", {"egmla"}))
        # Upstream asks for a core per rank; tiny models can share.
        self.use(mock.patch.object(test_fsdp_mixin, "_get_available_fsdp_workers", lambda: 4))
        # That one test is about the model's own initialisation.
        if self._testMethodName != "test_can_init_all_missing_weights":
            self.use(mock.patch.object(EGMLAGateNorm, "reset_parameters", random_gate))

    def use(self, patch) -> None:
        """Applies `patch` until the end of the test."""
        patch.start()
        self.addCleanup(patch.stop)

    def test_config(self):
        self.config_tester.run_common_tests()


class EGMLAGateTableModelTest(FSDPTesterMixin, EGMLAModelTest):
    """Everything optional: gate tables, a rank per layer, low-rank queries, biases, Llama's rotary order, no tying."""

    config_kwargs = {
        "kv_gate_embedding_dim": 6,
        "kv_lora_rank": [20, 14],
        "q_lora_rank": 16,
        "attention_bias": True,
        "query_bias": True,
        "mlp_bias": True,
        "rope_interleave": False,
        "tie_word_embeddings": False,
    }

    # Embeddings alone do not say which rows of the tables to read, so these two tests give the ids of the tokens too.

    def test_inputs_embeds(self):
        self.model_tester.give_gate_ids = True
        super().test_inputs_embeds()

    def test_inputs_embeds_matches_input_ids(self):
        self.model_tester.give_gate_ids = True
        super().test_inputs_embeds_matches_input_ids()
