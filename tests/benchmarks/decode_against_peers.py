"""`egmla bench` with the contestants and contexts of the table in this folder's README; options given here win.

python tests/benchmarks/decode_against_peers.py --batch 1 --rounds 5 --steps 4
"""

import sys

from egmla.commands import app


ARGUMENTS = [
    *("--contestants", "egmla,egmla-compiled,deepseek,llama-mha"),
    *("--context", "8192"),
    *("--batch", "1,8"),
    *("--prefill", "0"),
    *("--output", "egmla-bench-peers"),
]

if __name__ == "__main__":
    app(["bench", *ARGUMENTS, *sys.argv[1:]])
