r"""Matrices as products of two thin factors: ``powersgd``, and the NumPy specification of its arithmetic.

A tensor is seen as a matrix :math:`M` of n rows and m columns. All ranks have the same start :math:`Q`, m x r. With the
mean over the ranks i taken twice,

.. math:: P = \tfrac1k \sum_i M_i Q, \quad \hat P = \mathrm{orthonormal}(P), \quad
          Q = \tfrac1k \sum_i M_i^T \hat P, \quad \text{mean} = \hat P Q^T,

which is the orthogonal projection of the mean matrix on the span of :math:`\hat P`: one step of a power iteration. The
next start is the orthonormal basis of this Q, so that steps follow each other. What a rank did not send is
:math:`M_i - \hat P (M_i^T \hat P)^T`.

Here a factor is r vectors, one after the other: (r, n) and (r, m).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import keys
from .base import FLOAT32, Codec, Scheme, check_integer, register, sum64
from .cast import NoCompression

_SUM_ROWS = 64  # rows that are added up before their sum is added to the result
_DEGENERATE = 2.0**-40
MAX_APPROXIMATION_RANK = 1024


@register
@dataclasses.dataclass(frozen=True)
class PowerSgd(Scheme):
    r"""Send each matrix as two factors of rank r, found by one step of a power iteration that starts where it ended.

    :math:`32\,r\,(n + m)` bits for a matrix of n rows and m columns, whatever the number of ranks; see
    :mod:`pqasgd_horovod.codecs.low_rank` for the arithmetic. What is neither lost nor sent is kept: it needs
    ``feedback=hvd.Feedback()``. Tensors that take no fewer numbers as factors, vectors among them, travel as they are,
    in float32, as do both factors.

    Args:
        approximation_rank: r, from 1 to 1024; ``matrix_approximation_rank`` of PyTorch. Higher: more bytes, a smaller
            error.

    Raises ArgumentError for other values.

    Source: Vogels, Karimireddy, Jaggi, "PowerSGD: practical low-rank gradient compression for distributed
    optimization", NeurIPS 2019, algorithms 1 and 2. Here the start, too, is made orthonormal, as in PyTorch, which
    changes no span but keeps numbers of any size in range; a vector that depends on those before it is drawn anew.

    >>> PowerSgd(approximation_rank=2).factor_sizes((1024, 512))
    (2048, 1024)
    """

    id = "powersgd"
    unbiased = False
    contractive = True
    needs_feedback = True

    approximation_rank: int = 2

    def __post_init__(self) -> None:
        rank = check_integer("approximation_rank", self.approximation_rank, 1, MAX_APPROXIMATION_RANK)
        object.__setattr__(self, "approximation_rank", rank)

    @property
    def message_codec(self) -> Codec:
        """Factors are sent as they are."""
        return NoCompression()

    def factor_sizes(self, matrix: tuple[int, int]) -> tuple[int, int]:
        """Return how many numbers the two factors of a matrix of (rows, columns) have."""
        rows, cols = matrix
        return self.approximation_rank * rows, self.approximation_rank * cols

    def fits(self, matrix: tuple[int, int]) -> bool:
        """Return whether the factors have fewer numbers than the matrix.

        >>> [PowerSgd(2).fits(matrix) for matrix in ((10, 64), (2, 1000), (1000, 1))]
        [True, False, False]
        """
        return sum(self.factor_sizes(matrix)) < matrix[0] * matrix[1]

    def kept_numel(self, matrix: tuple[int, int]) -> int:
        """Return the size of the start of the next iteration."""
        return self.factor_sizes(matrix)[1] if self.fits(matrix) else 0


def draw(key: int, approximation_rank: int, cols: int) -> FLOAT32:
    """Return random vectors (r, cols), uniform in [-1, 1), of words 0 .. cols - 1 of block k each.

    >>> draw(1, 2, 3).shape
    (2, 3)
    """
    words = keys.random_words(key, np.arange(approximation_rank, dtype=np.uint32), cols)
    uniform: FLOAT32 = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return uniform


def reference_project(matrix: FLOAT32, right: FLOAT32) -> FLOAT32:
    """Return the left factor (r, n) of a matrix (n, m) and a right factor (r, m): sum64 of each row times each vector.

    >>> reference_project(np.ones((2, 3), np.float32), np.ones((1, 3), np.float32))
    array([[3., 3.]], dtype=float32)
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        left: FLOAT32 = np.stack([sum64(matrix * vector) for vector in right])
    return left


def reference_backproject(matrix: FLOAT32, left: FLOAT32) -> FLOAT32:
    """Return the right factor (r, m) of a matrix (n, m) and a left factor (r, n).

    Of each 64 rows in rising order the products are added up, then these sums.

    >>> reference_backproject(np.ones((2, 3), np.float32), np.ones((1, 2), np.float32))
    array([[2., 2., 2.]], dtype=float32)
    """
    right = np.zeros((len(left), matrix.shape[1]), np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for first in range(0, len(matrix), _SUM_ROWS):
            part = np.zeros_like(right)
            for i in range(first, min(first + _SUM_ROWS, len(matrix))):
                part += matrix[i] * left[:, i, None]
            right += part
    return right


def reference_product(left: FLOAT32, right: FLOAT32) -> FLOAT32:
    """Return the matrix (n, m) of two factors, added up in the order of the vectors.

    >>> reference_product(np.ones((1, 2), np.float32), np.ones((1, 3), np.float32)).shape
    (2, 3)
    """
    matrix = np.zeros((left.shape[1], right.shape[1]), np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for column, row in zip(left, right, strict=True):
            matrix += column[:, None] * row
    return matrix


def reference_orthogonalize(vectors: FLOAT32) -> FLOAT32:
    """Return orthonormal vectors (r, length) of the same span: modified Gram-Schmidt, each vector twice.

    Computed in float64, rounded to float32 after each step. A vector of which no more than 2^-20 of its length is left
    becomes 0.

    >>> reference_orthogonalize(np.array([[3.0, 4.0], [6.0, 8.0]], np.float32))
    array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    result = vectors.copy()
    for k, vector in enumerate(result):
        before = _dot(vector, vector)
        for _ in range(2):
            for other in result[:k]:
                vector[:] = vector.astype(np.float64) - _dot(other, vector) * other.astype(np.float64)
        after = _dot(vector, vector)
        vector[:] = vector.astype(np.float64) * (1 / np.sqrt(after)) if after > before * _DEGENERATE else 0
    return result


def _dot(a: FLOAT32, b: FLOAT32) -> np.float64:
    return np.float64(sum64(a.astype(np.float64) * b.astype(np.float64)))
