"""The distributions that new matrices are drawn from, each with one number for how far they spread.

The spread is the standard deviation of a normal distribution, and the gain of the others: of Glorot and Bengio (2010;
"xavier"), whose variance depends on rows and columns, and of matrices with orthogonal rows or columns (Saxe et al.,
arXiv 1312.6120).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openchatkit.errors import UserError

_METHODS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "normal": lambda matrix, spread, generator: matrix.normal_(0.0, spread, generator=generator),
    "xavier_uniform": lambda matrix, spread, generator: torch.nn.init.xavier_uniform_(matrix, spread, generator),
    "xavier_normal": lambda matrix, spread, generator: torch.nn.init.xavier_normal_(matrix, spread, generator),
    "orthogonal": lambda matrix, spread, generator: torch.nn.init.orthogonal_(matrix, spread, generator),
}


def check_method(name: str) -> str:
    """Return `name` if there is such a distribution; UserError lists those there are."""
    if name not in _METHODS:
        raise UserError(f"config.json: initializer is {name!r}, expected one of {', '.join(_METHODS)}")
    return name


def draw_matrix(method: str, shape: Sequence[int], spread: float, generator: torch.Generator) -> Tensor:
    """Draw a float32 matrix on the CPU, where the generator is: devices draw other numbers."""
    return _METHODS[method](torch.empty(tuple(shape), device="cpu"), spread, generator)
