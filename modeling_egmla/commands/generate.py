"""`egmla generate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, DType


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a converted, trained or stock causal model, or a Hub id.")],
    prompt: Annotated[
        str | None, typer.Option(help="What to answer or continue. Without it, every line you type is answered.")
    ] = None,
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
    dtype: Annotated[DType, typer.Option(help="Dtype of weights and cache; auto: the checkpoint's.")] = DType.auto,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Answer a prompt or chat; show the speed and the bytes of the cache."""
    import torch

    from egmla.configuration import preset_names
    from egmla.utils.streaming import encode_prompt, load_model, stream_answer

    from .common import check_model_path, find_device, quiet_transformers

    quiet_transformers()
    if model in preset_names():
        raise ValueError(
            f"{model} is a preset, a shape without weights; give the folder of a converted or trained model."
        )
    check_model_path(model)
    where = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        loaded, tokenizer = load_model(model, dtype.value, where)
    except OSError as error:
        if Path(model).is_dir():
            raise
        raise FileNotFoundError(
            f"{model} is no local folder, and the Hub has no such model or cannot be reached. Check the spelling and "
            "the connection; `egmla --debug generate ...` shows the Hub's answer."
        ) from error
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    if prompt is None:
        converse(loaded, tokenizer, system, chat, seed=seed, **sampling)
    else:
        ids = encode_prompt(tokenizer, prompt, system, chat)
        print_summary(stream_answer(loaded, tokenizer, ids, seed=seed, **sampling))


def converse(model, tokenizer, system: str | None, chat: bool, seed: int | None, **sampling: Any) -> None:
    """Answer each line of standard input, with all earlier lines and answers in the prompt, until /exit or its end.

    Args:
        system (`str`, *optional*): system message, for a tokenizer with a chat template.
        chat (`bool`): use the chat template. Without one, the text of all lines and answers is continued.
        seed (`int`, *optional*): makes drawing repeatable over the whole conversation.
    """
    from egmla.utils.streaming import encode_messages, encode_prompt, stream_answer

    templated = chat and tokenizer.chat_template is not None
    if system is not None and not templated:
        encode_prompt(tokenizer, "-", system, chat)  # says why there is no place for it
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = ""
    typer.echo("Type a message. /exit or Ctrl-D ends the chat.", err=True)
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        if templated:
            messages.append({"role": "user", "content": line})
            ids = encode_messages(tokenizer, messages)
        else:
            text += line + "\n"
            ids = encode_prompt(tokenizer, text, chat=False)
        result = stream_answer(model, tokenizer, ids, seed=seed, **sampling)
        seed = None
        messages.append({"role": "assistant", "content": result.text})
        text += result.text + "\n"
        print_summary(result)


def _read_line() -> str | None:
    """Return the next line of standard input; None at its end and for /exit."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if line.strip() == "/exit" else line


def print_summary(result) -> None:
    """Print what an answer took: tokens, speed, cache."""
    from .common import console

    console().print(
        f"\n{result.new_tokens} tokens in {result.seconds:.1f} s, {result.tokens_per_second:.1f} tokens/s "
        f"(prompt of {result.prompt_tokens} tokens included)\n"
        f"cache: {result.cached_tokens} tokens x {result.cache_elements_per_token:,.0f} elements, "
        f"{result.cache_used_bytes:,} bytes used, {result.cache_allocated_bytes:,} allocated",
        style="dim",
        soft_wrap=True,
    )
