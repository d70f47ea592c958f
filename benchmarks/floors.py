"""Lower bounds on time: the operations that remain after the algebra, and the bytes that must move, at the best rates.

The rates are measured in the same process: of the fastest of several routines for products, under PyTorch's default
precision settings, and of a large copy.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from benchmarks.measure import seconds

# A routine this many times slower than the best is not measured again.
_SLOW = 4


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    return min(seconds(call, device) for _ in range(3))


class Rates:
    """The routines that rates are measured with, and their tensors.

    Args:
        device: where.
        dtype: of the numbers.
        scale: divides every size; larger in tests.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, scale: int = 1) -> None:
        self.device = device
        # A GPU needs more of everything to be busy.
        more = 8 if device.type == "cuda" else 1
        square, rows, inputs, outputs = (size * more // scale for size in (1024, 4096, 512, 512))
        a_SS = torch.randn(square, square, device=device, dtype=dtype)
        x_TK = torch.randn(rows, inputs, device=device, dtype=dtype)
        w_OK = torch.randn(outputs, inputs, device=device, dtype=dtype)
        if device.type == "cuda":
            # Channels last, for cuDNN's fastest routines; with a single column, both layouts would be the same.
            x_1KT1 = x_TK.view(1, rows // 64, 64, inputs).permute(0, 3, 1, 2)
        else:
            x_1KT1 = x_TK.mT.contiguous()[None, :, :, None]
        w_OK11 = w_OK[:, :, None, None]
        linear = 2 * rows * inputs * outputs
        self._slow: dict[str, float] = {}
        self._products: dict[str, tuple[int, Callable[[], object]]] = {
            "torch.mm": (2 * square**3, lambda: torch.mm(a_SS, a_SS)),
            "linear": (linear, lambda: F.linear(x_TK, w_OK)),
            "1x1 convolution": (linear, lambda: F.conv2d(x_1KT1, w_OK11)),
        }
        if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype == torch.float32:
            pointwise = torch.ops.mkldnn._linear_pointwise
            self._products["oneDNN linear"] = (linear, lambda: pointwise(x_TK, w_OK, None, "none", [], ""))
        self._source = torch.empty((128 << 20) * more // scale, dtype=torch.uint8, device=device)
        self._copy = torch.empty_like(self._source)

    def products(self) -> dict[str, float]:
        """Operations per second of each routine, now; a routine that was slow is not measured again.

        On a GPU a float32 product that may not use TF32 takes several times as long as a convolution, which may.
        """
        rates = {
            name: self._slow.get(name) or count / _least_seconds(call, self.device)
            for name, (count, call) in self._products.items()
        }
        best = max(rates.values())
        self._slow |= {name: rate for name, rate in rates.items() if rate < best / _SLOW}
        return rates

    def bandwidth(self) -> float:
        """Bytes a second that a large copy reads and writes, now."""
        return 2 * self._source.numel() / _least_seconds(lambda: self._copy.copy_(self._source), self.device)


def floor_seconds(operations: int, input_bytes: int, products: Mapping[str, float], bandwidth: float) -> float:
    """The least time of a forward pass: its operations at the best rate, or X read twice and the output written once.

    Args:
        operations: that remain.
        input_bytes: of X.
        products: operations a second of each routine.
        bandwidth: bytes a second.

    Example:
        >>> floor_seconds(100, 10, {"slow": 10.0, "fast": 50.0}, 100.0)
        2.0
    """
    return max(operations / max(products.values()), 3 * input_bytes / bandwidth)
