"""Draw cache.svg, the README's figure of cache size against context, from configurations alone.

Usage: python .github/figures/draw_cache.py
"""

from pathlib import Path

from egmla.configuration import load_preset
from egmla.utils.accounting import mha_elements_per_token, mla_elements_per_token


TARGET = Path(__file__).with_name("cache.svg")
PRESET = "egmla-kv64-1.2b"
CONTEXT = 131_072
BF16_BYTES = 2
KEY_VALUE_HEADS = 8  # grouped queries, as Llama 3 has them

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 530, 44, 284
GB_SHOWN = 20


def series() -> list[tuple[str, str, int]]:
    """Return label, colour and cache bytes per token of each attention, all of the preset's width, depth and heads."""
    config = load_preset(PRESET)
    mha = mha_elements_per_token(config)
    return [
        ("MHA", "#8a8f98", mha * BF16_BYTES),
        (f"GQA, {KEY_VALUE_HEADS} heads", "#c07f2c", mha * KEY_VALUE_HEADS // config.num_attention_heads * BF16_BYTES),
        ("MLA, 256 + 64", "#3f7fbf", mla_elements_per_token(config) * BF16_BYTES),
        ("EG-MLA, 64 + 64", "#b3242f", config.cache_bytes_per_token(BF16_BYTES)),
    ]


def picture() -> str:
    """Return the figure as SVG: one straight line per attention, its bytes at the longest context beside it."""
    height_of_gb = (BOTTOM - TOP) / GB_SHOWN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#1f2328">',
        "<title>Cache size against context, by attention</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="26" font-weight="bold">KV cache in GB, one sequence, bf16, 1.2B parameters '
        "(18 layers, 32 heads)</text>",
    ]
    for gigabytes in range(0, GB_SHOWN + 1, 5):
        y = BOTTOM - gigabytes * height_of_gb
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{gigabytes}</text>')
    for tokens in range(0, CONTEXT + 1, CONTEXT // 4):
        x = LEFT + (RIGHT - LEFT) * tokens / CONTEXT
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{tokens // 1024}K</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}" text-anchor="middle">tokens in the cache</text>')
    lowest = BOTTOM + 22
    for label, colour, bytes_per_token in reversed(series()):
        gigabytes = bytes_per_token * CONTEXT / 1e9
        y = BOTTOM - gigabytes * height_of_gb
        lowest = min(y + 4, lowest - 18)  # labels of neighbouring lines must not overlap
        parts.append(
            f'<line x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{y:.1f}" stroke="{colour}" stroke-width="2.5"/>'
        )
        parts.append(
            f'<text x="{RIGHT + 8}" y="{lowest:.1f}" fill="{colour}" font-weight="bold">'
            f"{label}: {gigabytes:.1f}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
    print(f"Wrote {TARGET.name}.")
