"""Values unlike the defaults for the fields that every configuration has; `ConfigTester` reads them back."""

config_common_kwargs = {
    "architectures": ["SomeModel"],
    "bos_token_id": 6,
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "eos_token_id": 8,
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "pad_token_id": 7,
    "problem_type": "regression",
    "return_dict": False,
    "tie_word_embeddings": False,
}
