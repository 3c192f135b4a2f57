"""`egmla generate`."""

from typing import Annotated

import typer

from .common import DType


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a converted, trained or stock causal model, or a hub id.")],
    prompt: Annotated[str, typer.Option(help="What to answer or continue.")],
    system: Annotated[str | None, typer.Option(help="System message (needs a chat template).")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template when it has one.")
    ] = True,
    dtype: Annotated[DType, typer.Option(help="Format of weights and cache; auto is the checkpoint's.")] = DType.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Generate text, shown as it comes; ends with the speed and the bytes the cache took."""
    import torch

    from egmla.configuration import preset_names
    from egmla.utils.streaming import encode_prompt, load_model, stream_answer

    from .common import check_model_path, quiet_transformers

    quiet_transformers()
    if model in preset_names():
        raise ValueError(
            f"{model} is a preset, a shape without weights; give the folder of a converted or trained model."
        )
    check_model_path(model)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, dtype.value)
    ids = encode_prompt(tokenizer, prompt, system, chat)
    result = stream_answer(
        loaded, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    print_summary(result)


def print_summary(result) -> None:
    """Prints what an answer took: tokens, speed, cache."""
    from .common import console

    console().print(
        f"\n{result.new_tokens} tokens in {result.seconds:.1f} s, {result.tokens_per_second:.1f} tokens/s "
        f"(prompt of {result.prompt_tokens} tokens included)\n"
        f"cache: {result.cached_tokens} tokens x {result.cache_elements_per_token:,.0f} elements, "
        f"{result.cache_used_bytes:,} bytes used, {result.cache_allocated_bytes:,} allocated",
        style="dim",
        soft_wrap=True,
    )
