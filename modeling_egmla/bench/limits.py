"""Measure the limits of this machine: memory bandwidth and matmul speed."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from egmla.cpu_egmla import inference_matmul
from egmla.utils.timing import Timer


# Bytes of the matrices that bandwidth is measured with: more than the last-level cache of any processor.
SWEEP_BYTES = 512 * 2**20
# Largest side of one of them; larger matrices give no more bandwidth.
SIDE = 4096
# First side of the matrices of a matmul. It is doubled until one matmul takes PRODUCT_SECONDS: without instructions
# for it, bf16 is hundreds of times slower.
PRODUCT_SIDE = 256
PRODUCT_SECONDS = 0.02
# Bandwidth of GEMV and of plain reading. No step is faster than the higher one allows.
BANDWIDTHS = ("gemv_bytes_per_second", "read_bytes_per_second")


class Limits:
    """Measure memory bandwidth by reading matrices once each, and matmul speed on large matrices.

    Decoding at batch 1 multiplies weights with a vector (GEMV). That is measured with the kernel of `nn.Linear` and
    with the one of EG-MLA's layers, and the faster one counts. A plain sum may read faster than both; compiled models
    come near it. Attention of all heads over one latent may be limited by arithmetic instead.

    Args:
        dtype (`torch.dtype`): dtype of the matrices.
        device (`torch.device`): their device.
        nbytes (`int`): their total bytes.
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
        """Bytes per second of GEMV over all matrices."""

        def sweep(product: Callable[..., torch.Tensor]) -> float:
            return self._timer.measure(lambda: [product(self._vector, matrix) for matrix in self.matrices])[1]

        seconds = sweep(nn.functional.linear)
        if self._vector.dtype == torch.float32 and self._vector.device.type == "cpu":
            seconds = min(seconds, sweep(inference_matmul))
        return self.nbytes / seconds

    @torch.no_grad()
    def read(self) -> float:
        """Bytes per second of summing all matrices."""
        _, seconds = self._timer.measure(lambda: [matrix.view(torch.float32).sum() for matrix in self.matrices])
        return self.nbytes / seconds

    def multiply(self) -> float:
        """Floating point operations per second of one matmul; a multiplication and an addition count as two.

        On a CPU fp32 is measured too and the faster dtype counts, as attention kernels may compute in fp32.
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
        """Measure all three, under their names in reports."""
        return {
            "gemv_bytes_per_second": self.gemv(),
            "read_bytes_per_second": self.read(),
            "product_flops_per_second": self.multiply(),
        }


def median_limits(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over several results of `Limits.measure`."""
    return {name: statistics.median(row[name] for row in measured) for name in measured[0]}


def bandwidth(limits: Mapping[str, float]) -> float:
    """The higher of the two bandwidths in a result of `Limits.measure`, in bytes per second."""
    return max(limits[name] for name in BANDWIDTHS)
