"""The command line in tests: runs a command in this process, and makes a small word tokenizer."""

import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from egmla.commands import app
from egmla.samples import sample_text


WORDS = sorted(set(re.findall(r"\w+", sample_text("evaluation"))))[:200]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}and {% endif %}"
)
SHAPE = {
    "vocab_size": 202,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def run(*arguments: object):
    # A traceback asked for by --debug reaches the test; the width keeps messages in one line.
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<unk>": 0, "<end>": 1} | {word: number for number, word in enumerate(WORDS, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
