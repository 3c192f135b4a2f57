"""Limits of this machine: memory bandwidth and matmul speed."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from egmla.cpu_egmla import inference_matmul
from egmla.utils.timing import Timer


# Bytes of the matrices that bandwidth is measured on: more than the last cache of any processor.
SWEEP_BYTES = 512 * 2**20
# Side of one of them, when there is room: larger gives no more.
SIDE = 4096
# Side of those that are multiplied with each other, doubled until one product takes PRODUCT_SECONDS: without
# instructions for it, bf16 is slower by a factor of hundreds.
PRODUCT_SIDE = 256
PRODUCT_SECONDS = 0.02
# Of matrix-vector products and of plain reading; no step beats the higher one.
BANDWIDTHS = ("gemv_bytes_per_second", "read_bytes_per_second")


class Limits:
    """Bytes per second of sweeping matrices once each, and operations per second of products of large matrices.

    The product of a matrix with a vector is what decoding at batch 1 does with weights, in the kernel of `nn.Linear`
    or, where EG-MLA's layers have another, the faster of the two. A plain sum may read faster than either, and what is
    compiled comes near it. Attention of all heads over one latent may be bound by arithmetic instead.

    Args:
        dtype (`torch.dtype`): number format of the matrices.
        device (`torch.device`): where they lie.
        nbytes (`int`): their bytes together.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", nbytes: int = SWEEP_BYTES):
        side = max(2, min(SIDE, int((nbytes // dtype.itemsize) ** 0.5)) // 2 * 2)  # even, to be read as fp32 too
        count = max(1, nbytes // (side * side * dtype.itemsize))
        self.matrices = [torch.full((side, side), 0.01, dtype=dtype, device=device) for _ in range(count)]
        self.nbytes = sum(matrix.nbytes for matrix in self.matrices)
        self._vector = torch.full((1, side), 0.01, dtype=dtype, device=device)
        self._timer = Timer(device)

    @torch.no_grad()
    def gemv(self) -> float:
        """Bytes per second of one sweep of products with a vector."""

        def sweep(product: Callable[..., torch.Tensor]) -> float:
            return self._timer.measure(lambda: [product(self._vector, matrix) for matrix in self.matrices])[1]

        seconds = sweep(nn.functional.linear)
        if self._vector.dtype == torch.float32 and self._vector.device.type == "cpu":
            seconds = min(seconds, sweep(inference_matmul))
        return self.nbytes / seconds

    @torch.no_grad()
    def read(self) -> float:
        """Bytes per second of one sweep of sums."""
        _, seconds = self._timer.measure(lambda: [matrix.view(torch.float32).sum() for matrix in self.matrices])
        return self.nbytes / seconds

    def multiply(self) -> float:
        """Floating point operations per second of one product of square matrices, multiply and add being two.

        On a CPU of fp32 ones where that is faster: attention kernels may sum in another format than weights have.
        """
        dtypes = {self._vector.dtype}
        if self._vector.device.type == "cpu":
            dtypes.add(torch.float32)
        return max(self._multiply(dtype) for dtype in dtypes)

    @torch.no_grad()
    def _multiply(self, dtype: torch.dtype) -> float:
        largest = self.matrices[0].shape[0]
        side = min(PRODUCT_SIDE, largest)
        while True:
            matrix = self.matrices[0][:side, :side].to(dtype).contiguous()
            _, seconds = self._timer.measure(partial(torch.matmul, matrix, matrix))
            if seconds > PRODUCT_SECONDS or 2 * side > largest:
                return 2 * side**3 / seconds
            side *= 2

    def measure(self) -> dict[str, float]:
        """All three, by the names they have in reports."""
        return {
            "gemv_bytes_per_second": self.gemv(),
            "read_bytes_per_second": self.read(),
            "product_flops_per_second": self.multiply(),
        }


def median_limits(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The medians of what `Limits.measure` gave several times."""
    return {name: statistics.median(row[name] for row in measured) for name in measured[0]}


def bandwidth(limits: Mapping[str, float]) -> float:
    """The higher one of the bandwidths in what `Limits.measure` gave, bytes per second."""
    return max(limits[name] for name in BANDWIDTHS)
