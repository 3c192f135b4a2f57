"""The architecture figure of a card: one layer's attention with this model's widths. Needs the `plot` extra."""

import os

from egmla import EGMLAConfig
from egmla.utils.plotting import COLOURS, check_matplotlib


FIGURE_NAME = "architecture.png"
# Width and height of a box, in units of the drawing.
BOX = (2.3, 0.8)


def draw_architecture(config: EGMLAConfig, path: str | os.PathLike) -> None:
    """Draws what a layer computes from a token, what it caches and how heads read it; saves a PNG.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = Figure(figsize=(10, 4.2))
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set_xlim(0, 13.6)
    axis.set_ylim(0.7, 6.4)
    axis.axis("off")

    def box(x: float, y: float, heading: str, detail: str, colour: str = "#F2F2F2", height: float = BOX[1]) -> None:
        axis.add_patch(
            FancyBboxPatch(
                (x, y),
                BOX[0],
                height,
                boxstyle="round,pad=0.02,rounding_size=0.12",
                facecolor=colour,
                edgecolor="#444",
            )
        )
        middle = x + BOX[0] / 2
        axis.text(middle, y + height / 2 + 0.15, heading, ha="center", va="center", fontsize=10.5, fontweight="bold")
        axis.text(middle, y + height / 2 - 0.2, detail, ha="center", va="center", fontsize=8.5, color="#333333")

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#444", linewidth=1.1))

    ranks = sorted(set(config.layer_kv_lora_ranks))
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    heads, rotary = config.num_attention_heads, config.qk_rope_head_dim
    table = config.kv_gate_embedding_dim
    expanded = config.kv_gate == "expanded"
    cached = f"{rank} + {rotary} per token" + (", its id" if expanded else "")

    box(0.3, 3.5, "hidden state", f"{config.hidden_size}")
    box(0.3, 1.0, "queries", f"{heads} heads x ({config.qk_nope_head_dim} + {rotary})")
    box(3.7, 3.5, "latent", f"{rank}" + (", RMSNorm" if config.kv_latent_norm else ""))
    if config.kv_gate is not None:
        fed = f"input embedding, {config.hidden_size}" if table is None else f"table by token id, {table}"
        box(0.3, 5.3, "token", fed, COLOURS[4])
        width = heads * (config.qk_nope_head_dim + config.v_head_dim) if expanded else rank
        box(3.7, 5.3, "gate", f"{width}, LayerNorm", COLOURS[4])
        arrow((2.65, 5.7), (3.65, 5.7))
        if expanded:  # the gate acts on what is made of cached latents, not on what is cached
            axis.text(8.3, 4.8, "times keys, values", ha="left", va="center", fontsize=9)
            arrow((6.05, 5.5), (10.2, 3.85))
        else:
            axis.text(4.95, 4.8, "times", ha="left", va="center", fontsize=9)
            arrow((4.85, 5.25), (4.85, 4.35))
    if rotary:
        box(3.7, 2.25, "rotary key", f"{rotary}, RoPE")
        arrow((2.65, 3.7), (3.65, 2.75))
        arrow((6.05, 2.65), (7.2, 3.2))
    arrow((2.65, 3.9), (3.65, 3.9))
    arrow((6.05, 3.9), (7.2, 3.55))
    arrow((1.45, 3.45), (1.45, 1.85))
    box(7.25, 2.8, "cache", cached, COLOURS[1], height=1.1)
    if expanded:
        box(7.25, 1.0, "queries", f"{heads} heads x ({config.qk_nope_head_dim} + {rotary})")
    else:
        box(7.25, 1.0, "absorbed queries", f"{heads} heads x ({rank} + {rotary})")
        axis.text(4.95, 1.52, "W_UK", ha="center", fontsize=8.5, color="#333333")
    arrow((2.65, 1.4), (7.2, 1.4))
    arrow((8.4, 1.85), (8.4, 2.75))
    box(11.0, 2.95, "output", f"{heads} heads x {config.v_head_dim} -> {config.hidden_size}")
    arrow((9.6, 3.35), (10.95, 3.35))
    attend = "expand, attend" if expanded else "attend, W_UV"
    axis.text(10.28, 3.6, attend, ha="center", fontsize=8.5, color="#333333")
    axis.text(7.25, 5.7, "All heads read the same cache entries;", fontsize=9.5, color="#333333", va="center")
    axis.text(7.25, 5.32, f"{config.num_hidden_layers} such layers.", fontsize=9.5, color="#333333", va="center")
    figure.savefig(path, dpi=110)
