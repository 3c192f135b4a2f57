"""What a card says of a converted model, from its conversion report."""

from pathlib import Path

from egmla import EGMLAConfig
from egmla.utils.provenance import CONVERSION_FIGURE


def summary(config: EGMLAConfig, conversion: dict, base_model: str | None, trained: bool) -> str:
    plan, origin = conversion["plan"], conversion["source"]
    name = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{origin['label']}`"
    then = " and then trained further" if trained else ""
    text = (
        f"{name}, converted to EG-MLA (embedding-gated multi-head latent attention){then}: each layer caches one "
        "latent and one rotary key per token for all heads, and decoding reads them as they are."
    )
    if plan["exact"] and trained:
        return f"{text} The conversion was exact, so the cache is of the source's size."
    if plan["exact"]:
        return f"{text} This is the exact conversion: the source's function, and a cache of the source's size."
    if cache := conversion.get("cache"):
        largest, *smaller = cache["budgets"]
        shares = largest["shares"]
        text += (
            f" The cache gives each channel bits by importance. It takes {shares['32768']:.1%} of the bytes of the "
            f"source's cache in bf16 at 32,768 tokens, and {shares['2048']:.1%} at 2,048."
        )
        if smaller:
            sizes = ", ".join(f"{budget['share']:g}" for budget in smaller)
            text += f" `EGMLACache(config, bits=...)` makes smaller ones: {sizes}."
        return text
    return (
        f"{text} The cache holds {config.cache_elements_per_token:,} elements per token, "
        f"{plan['cache_kept']:.1%} of the source's {plan['source_elements']:,}."
    )


def perplexity(conversion: dict, training: dict | None) -> str:
    """Render what `egmla convert --evaluate` measured; empty where it was not asked for."""
    evaluation, when = conversion.get("evaluation"), "when it was converted"
    name = "this model" if training is None else "converted, not yet trained"
    if training is not None and "measured" in training:
        evaluation, name, when = training["measured"], "this model", "after it was trained"
    if evaluation is None:
        return ""
    text = (
        f"in float32, on {evaluation['windows']:,} windows of {evaluation['window']:,} tokens of "
        f"`{evaluation['file']}` (SHA-256 of the text read `{evaluation['sha256']}`)."
    )
    if "caches" not in evaluation:
        lines = ["| | perplexity |", "| --- | ---: |", f"| source | {evaluation['source']:.3f} |"]
        lines += [f"| {name} | {evaluation['converted']:.3f} |", "", f"Measured {when}, {text}"]
        return "\n".join(lines)
    questions = evaluation["questions"]
    lines = ["| cache | perplexity | times the source's | facts retrieved |", "| --- | ---: | ---: | ---: |"]
    for cache, row in evaluation["caches"].items():
        error = "" if not row["ratio_error"] else f" ± {row['ratio_error']:.4f}"
        found = "" if row["retrieved"] is None else f"{row['retrieved']} of {questions}"
        lines.append(
            f"| {_cache_label(cache, name)} | {row['perplexity']:.3f} | {row['ratio']:.4f}{error} | {found} |"
        )
    lines += ["", f"Measured {when}, read through its caches 64 tokens at a time, {text}"]
    if questions:
        lines[-1] += f" Facts are hidden in passages of {evaluation['passage_tokens']:,} tokens of it."
    return "\n".join([*lines, *_continuations(evaluation, name)])


def _continuations(evaluation: dict, name: str) -> list[str]:
    """Five contexts as source and caches continue them; none in reports of earlier versions."""
    if not (rows := evaluation.get("continuations")):
        return []
    lines = ["", f"What each writes after {evaluation['context_tokens']:,} tokens of that text, greedily:", ""]
    for row in rows:
        lines.append(f"- … {_one_line(row['context'])}")
        for cache, text in row.items():
            if cache != "context":
                lines.append(f"  - {_cache_label(cache, name)}: {_one_line(text)}")
    return lines


def _cache_label(cache: str, name: str) -> str:
    return "source" if cache == "source" else f"{name}, {float(cache):.3g} of the bytes"


def _one_line(text: str) -> str:
    """Return text as inline code, which no renderer takes for markup."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def made(conversion: dict, folder: Path) -> str:
    origin, calibration, recipe = conversion["source"], conversion["calibration"], conversion["recipe"]
    lines = [f"```bash\n{conversion['command']}\n```\n"]
    lines.append(f"- source: `{origin['label']}` ({origin['model_type']})")
    if calibration:
        lines.append(
            f"- calibration: {calibration['sequences']} sequences of {calibration['sequence_length']:,} tokens from "
            f"`{calibration['file']}`, SHA-256 of the text read `{calibration['sha256']}`"
        )
        lines += _refinement(conversion)
    else:
        lines.append("- calibration: none, an exact conversion needs none")
    if recipe:
        lines.append("- recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
    lines.append("- versions: " + ", ".join(f"{name} {value}" for name, value in conversion["versions"].items()))
    commit = conversion["commit"]
    lines.append(f"- commit of egmla: {f'`{commit}`' if commit else 'not known, an installed package made it'}")
    if (folder / CONVERSION_FIGURE).is_file():
        lines.append(f"\n![How each layer fared in the conversion]({CONVERSION_FIGURE})")
    return "\n".join(lines)


def _refinement(conversion: dict) -> list[str]:
    """The line about the refinement; none for older reports, which do not mention it."""
    if "refinement" not in conversion:
        return []
    refinement = conversion["refinement"]
    if refinement is None:
        return ["- refinement: none, the closed form as it is"]
    batch, length = refinement["batch_size"], conversion["calibration"]["sequence_length"]
    gate = "the gate trained with the rest" if refinement["gate"] else "the gate not trained"
    return [
        f"- refinement: each layer's attention by itself, {refinement['steps']} steps of {batch} of those sequences "
        f"({refinement['steps'] * batch * length:,} tokens), {gate}; learning rate {refinement['learning_rate']:g}, "
        f"matrix products in {refinement['dtype']}"
    ]


def limits(conversion: dict, results: dict | None, training: dict | None, changed: bool) -> list[str]:
    limits = []
    refinement = conversion.get("refinement")
    if conversion["plan"]["exact"]:
        limits.append("The cache is as large as the source's: a starting point for training, not a saving.")
    elif training is None and not changed:
        what = (
            "Each layer's attention was refined by itself on the calibration text and nothing was trained end to end"
            if refinement
            else "Nothing was trained after the conversion"
        )
        limits.append(f"{what}, so quality below the source's is to be expected.")
    if "rank" in conversion:
        limits.append("The cache is smaller by its rank, which loses more than quantising it to the same bytes.")
    if changed:
        limits.append("The weights have changed since they were last reported on, and nothing here says how.")
    elif training is None and refinement and refinement["gate"]:
        limits.append("The gate was trained in that refinement only.")
    elif training is None:
        limits.append("The gate is at identity: it changes nothing until the model is trained.")
    if training is not None:
        limits.append("The text it was healed on is all it was trained on since: other domains may have gained less.")
    if conversion["source"]["label"].endswith(".gguf"):
        limits.append("The source was read from a quantised GGUF file: these are the weights of the rounded model.")
    if results is None:
        limits.append("No task was measured.")
    limits.append("What the source does wrong, this model does too.")
    return limits


def licence(license: str | None, name: str | None, source: str) -> str:
    if license is None:
        return f"The source, {source}, states none that this card could carry over: look it up before use."
    stated = f"{license} ({name})" if name else license
    return f"That of the source, {source}: {stated}. The code in this repository is Apache-2.0."
