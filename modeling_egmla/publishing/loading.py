"""Loading a folder the way a stranger does: in a clean process, without this package, with `trust_remote_code`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


# Every import of egmla fails, so that the folder's own code is what loads. The last line printed is the result.
SCRIPT = """
import json, sys

class NoPackage:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "egmla":
            raise ModuleNotFoundError("No module named 'egmla'", name="egmla")

sys.meta_path.insert(0, NoPackage)

import torch
import transformers

folder = sys.argv[1]
transformers.utils.logging.disable_progress_bar()
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
architecture = (config.architectures or ["EGMLAForCausalLM"])[0]
kinds = [kind for kind, name in config.auto_map.items() if name.rpartition(".")[2] == architecture]
if not kinds:
    raise ValueError(f"auto_map has no entry for the architecture {architecture}")
model, info = getattr(transformers, kinds[0]).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
    if info.get(kind):
        raise ValueError(f"weights and code do not fit: {kind} {sorted(map(str, info[kind]))[:3]}")
ids = torch.arange(1, min(9, config.vocab_size))[None]
with torch.no_grad():
    output = model.eval()(ids)[0]
if not torch.isfinite(output).all():
    raise ValueError("the model's output is not finite")
if sys.argv[2] == "tokenizer":
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("Hello")
print(json.dumps({"class": type(model).__name__, "module": type(model).__module__}))
"""


def check_loads_without_package(folder: Path, python: str = sys.executable) -> dict:
    """Loads and runs the model, and its tokenizer if there, in a process that cannot import egmla or reach the Hub.

    Args:
        folder (`Path`): the checkpoint.
        python (`str`): the interpreter to run.

    Returns:
        The model's `class` and `module`.

    Raises:
        ValueError: when it does not load or run; the message ends with the process's own last line.
    """
    tokenizer = (folder / "tokenizer_config.json").is_file()
    with tempfile.TemporaryDirectory() as scratch:
        # A module cache of its own: one shared with other runs could hold code that the folder lacks.
        environment = os.environ | {
            "HF_MODULES_CACHE": scratch,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("HF_TOKEN", None)
        command = [python, "-c", SCRIPT, str(folder.resolve()), "tokenizer" if tokenizer else "model"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, cwd=scratch
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reasons = [line for line in done.stderr.strip().splitlines() if line and not line[0].isspace()]
        reason = reasons[-1] if reasons else f"the process ended with code {done.returncode}"
        raise ValueError(
            f"{folder} was not sent: it does not load in a clean process with trust_remote_code=True and without the "
            f"egmla package: {reason}"
        )
    return json.loads(lines[-1])
