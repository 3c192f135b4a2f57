"""Groups of options and examples, as `egmla COMMAND --help` shows them."""

# The groups in the order in which help shows them, each with its options. `heal--temperature`: in heal the option of
# that name means something else.
GROUPS = {
    "What to make": "--kv-lora-rank --qk-rope-head-dim --cache --cache-dtype --max-rank --exact --latent-norm "
    "--layout --recipe",
    "Calibration and refinement": "--calibration --shipped-text --calibration-tokens --refine-steps --refine-gate "
    "--heal --heal-data",
    "Data": "--data --tokens --text-field --tokenizer --new-tokenizer --sequence-length --contexts --context-tokens",
    "Teacher and loss": "--teacher --stage --kl-weight --ce-weight heal--temperature --lora-rank --rounding",
    "Training": "--batch-size --micro-batch-size --learning-rate --gate-learning-rate --weight-decay --warmup-share "
    "--gradient-checkpointing --bf16 --chunk",
    "Prompt": "--prompt --system --chat --question",
    "Generation": "--max-new-tokens --temperature --top-p",
    "Evaluation": "--evaluate --evaluation-windows --eval-data --eval-share --eval-tokens --eval-every --tasks "
    "--limit --num-fewshot --data-dir --include-path --model-args --quick --full",
    "What to measure": "--peers --retrieval --passages --context --batch --contestants --rounds --steps "
    "--turn-seconds --prefill --memory --memory-tokens",
    "Model card": "--scores --repo-id --license --license-name --base-model --overwrite",
    "Publishing": "--private --revision --allow --message",
    "Machine": "--device --dtype --threads --seed --cpu-kernel",
    "Files": "--output --json --checkpoints --keep-checkpoints --save-every --resume --config",
    "Other": "--set --dry-run --yes --debug --version --install-completion --show-completion --help",
}
GROUP_OF = {option: group for group, options in GROUPS.items() for option in options.split()}

EXAMPLES = {
    "demo": """
        egmla demo
        egmla demo --full --output demo-full
    """,
    "convert": """
        egmla convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2-exact --exact
        egmla convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2-quarter \\
            --cache 0.25 --calibration text.txt
        egmla convert --config run.yaml --dry-run
    """,
    "sweep": """
        egmla sweep HuggingFaceTB/SmolLM2-135M-Instruct sweep \\
            --cache 0.5,0.3125 --calibration text.txt --evaluate other.txt
        egmla sweep HuggingFaceTB/SmolLM2-135M-Instruct peers --peers \\
            --cache 0.25,0.125,0.0625 --evaluate other.txt --retrieval 512,2048
    """,
    "heal": """
        egmla heal smollm2-half smollm2-healed --data text.txt --tokens 5M \\
            --teacher HuggingFaceTB/SmolLM2-135M-Instruct
        egmla heal smollm2-half smollm2-healed --config run.yaml --dry-run
    """,
    "gate": """
        egmla gate smollm2-half --data wiki.txt --data code.txt
    """,
    "train": """
        egmla train egmla-kv64-120m my-model --data text.txt --tokens 50M \\
            --new-tokenizer 8192
    """,
    "generate": """
        egmla generate smollm2-half
        egmla generate smollm2-half --prompt 'What is the capital of France?'
    """,
    "compare": """
        egmla compare HuggingFaceTB/SmolLM2-135M-Instruct smollm2-half \\
            --tasks egmla_quick --limit 100 --output comparison
    """,
    "bench": """
        egmla bench egmla-kv64-120m --context 512,2048 --batch 1
        egmla bench HuggingFaceTB/SmolLM2-135M-Instruct smollm2-half
    """,
    "eval": """
        egmla eval smollm2-half --tasks piqa,arc_easy --limit 200
    """,
    "inspect": """
        egmla inspect egmla-kv64-120m
        egmla inspect smollm2-half
    """,
    "presets": """
        egmla presets
    """,
    "card": """
        egmla card smollm2-half --repo-id me/smollm2-half
    """,
    "push": """
        egmla push smollm2-half me/smollm2-half --dry-run
    """,
}
