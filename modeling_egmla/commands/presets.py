"""`egmla presets`."""


def presets() -> None:
    """List the presets: parameters, cache per token, and how much smaller it is than that of MHA and MLA."""
    from rich.table import Table

    from egmla.configuration import load_preset, preset_names
    from egmla.utils.accounting import (
        count_parameters,
        meta_model,
        mha_elements_per_token,
        mla_elements_per_token,
    )

    from .common import change, console, in_units

    table = Table(title="Presets", caption="cache per token over all layers, bf16; MLA caches 256 + 64 a layer")
    table.add_column("preset", no_wrap=True)
    for heading in ("parameters", "gate tables", "cache elements", "cache bytes", "vs MHA", "vs MLA kv256"):
        table.add_column(heading, justify="right")
    for name in preset_names():
        config = load_preset(name)
        counts = count_parameters(meta_model(config))
        tables = counts.pop("gate tables")
        elements = config.cache_elements_per_token
        table.add_row(
            name,
            in_units(sum(counts.values())),
            f"+{in_units(tables)}" if tables else "none",
            f"{elements:,}",
            f"{config.cache_bytes_per_token():,}",
            change(elements, mha_elements_per_token(config)),
            change(elements, mla_elements_per_token(config)),
        )
    console().print(table)
