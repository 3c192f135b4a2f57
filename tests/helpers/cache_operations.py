"""What tests of caches share: bytes by storages, operations on any cache, and a spy on what a decode step makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def reachable_tensors(value, seen=None):
    """Every tensor an object holds, in whatever attribute, list or dictionary."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from reachable_tensors(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from reachable_tensors(item, seen)
    elif hasattr(value, "__dict__"):
        yield from reachable_tensors(vars(value), seen)


def storage_bytes(value) -> int:
    """Bytes of the storages behind all tensors an object holds, each counted once."""
    storages = [tensor.untyped_storage() for tensor in reachable_tensors(value)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def check_selections(cache, fill, assert_holds):
    """Sequences reordered, selected and repeated, and appended to: 130 tokens of 0, 0, 0, 2, 2, 2 in the end."""
    fill(cache, [0, 1, 2], 0, 70)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_holds(cache, [2, 0, 0], 70)
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert_holds(cache, [0, 2], 70)
    cache.batch_repeat_interleave(3)
    assert_holds(cache, [0, 0, 0, 2, 2, 2], 70)
    fill(cache, [0, 0, 0, 2, 2, 2], 70, 130)


def call_every_operation(cache):
    """What an empty cache must bear."""
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-2)
    cache.reset()


class Spy(TorchDispatchMode):
    """Names of the operators that run and the largest storage, in elements, that they make."""

    def __init__(self, model, cache):
        super().__init__()
        stored = (storage for layer in cache.layers for storage in layer.storages)
        known = [*model.parameters(), *model.buffers(), *stored]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.operators: list[str] = []
        self.largest = (0, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators.append(func.overloadpacket.__name__)
        for tensor in reachable_tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, (storage.nbytes() // tensor.element_size(), self.operators[-1]))
        return out

    def count(self, name: str) -> int:
        return sum(operator == name for operator in self.operators)


# Of the two layers that `entries` is for.
WIDTHS = [16, 24]


def entries(layer_idx, sequences, start, end):
    """Entries whose values say which sequence, token, layer and element they are: `[B, 1, T, R]`, `[B, 1, T, P]`."""
    width = WIDTHS[layer_idx]
    generator = torch.Generator()
    rows = []
    for b in sequences:
        for t in range(start, end):
            generator.manual_seed(10_000 * b + 10 * t + layer_idx)
            rows.append(torch.randn(width, generator=generator))
    values = torch.stack(rows).reshape(len(sequences), 1, end - start, width)
    return values.split([width - 4, 4], dim=-1)


def fill(cache, sequences, start, end):
    for layer_idx in range(2):
        cache.update(*entries(layer_idx, sequences, start, end), layer_idx)


def check_operations_of_generation(cache, assert_holds) -> None:
    """Selections as beams make them, then a reset and other sequences; `assert_holds(cache, sequences, end)`."""
    check_selections(cache, fill, assert_holds)
    assert_holds(cache, [0, 0, 0, 2, 2, 2], 130)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.allocated_nbytes == storage_bytes(cache) == 0
    fill(cache, [1], 0, 4)
    assert_holds(cache, [1], 4)


def check_operations_on_an_empty_cache(cache, assert_holds) -> None:
    """Each operation leaves an empty cache empty, and it can be filled afterwards."""
    call_every_operation(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert cache.get_seq_length() == 0 and cache.nbytes == cache.allocated_nbytes == 0
    assert cache.layers[0].keys is None and cache.layers[0].values is None
    cache.early_initialization(batch_size=1, num_heads=9, head_dim=9, dtype=torch.float32, device="cpu")
    assert cache.get_seq_length() == 0
    fill(cache, [0], 0, 2)
    assert_holds(cache, [0], 2)
