"""Groups of contestants whose models and caches fit into memory together."""

from collections.abc import Mapping, Sequence


def pack(
    needs: Mapping[str, tuple[int, int]],
    weights: Mapping[str, Mapping[str, int]],
    ours: Sequence[str],
    pending: Sequence[str],
    budget: int,
) -> tuple[list[list[str]], dict[str, int]]:
    """Group contestants so that each group fits into memory. Each group holds ours, for the ratios.

    A contestant that does not fit beside all of ours is grouped with the first of ours only.

    Args:
        needs (`Mapping[str, tuple[int, int]]`): bytes each contestant holds beyond weights, and the
            temporary bytes while it is timed.
        weights (`Mapping[str, Mapping[str, int]]`): bytes of the weights of each role a contestant needs.
        ours (`Sequence[str]`): contestants that every group holds.
        pending (`Sequence[str]`): contestants still to be measured.
        budget (`int`): bytes available.

    Returns:
        `tuple`: the groups, and the bytes that each omitted contestant would have needed.
    """

    def together(names: Sequence[str]) -> int:
        roles = {role: size for name in names for role, size in weights[name].items()}
        held = sum(needs[name][0] for name in names)
        return sum(roles.values()) + held + max((needs[name][1] for name in names), default=0)

    left_out: dict[str, int] = {}
    base: list[str] = []
    for name in ours:
        if together([*base, name]) <= budget:
            base.append(name)
        elif name in pending:
            left_out[name] = together([*base, name])
    groups: list[list[str]] = []
    for name in pending:
        if name in ours:
            continue
        groups_with_room = [group for group in groups if together([*group, name]) <= budget]
        new_groups = [[*some, name] for some in (base, base[:1]) if together([*some, name]) <= budget]
        if groups_with_room:
            groups_with_room[0].append(name)
        elif new_groups:
            groups.append(new_groups[0])
        else:
            left_out[name] = together([*base[:1], name])
    # Ours are measured even if no other contestant is left.
    if any(name in pending and not any(name in group for group in groups) for name in base):
        groups.insert(0, base)
    return groups, left_out
