"""The cost of `eigsh` apart from the products, from the sizes of the problem."""

from __future__ import annotations

from dataclasses import dataclass

from eigenfilter.curvature.solvers.eigsh import THICKNESS, default_basis


@dataclass(frozen=True)
class Cost:
    """The cost for one process, without the products with the operator.

    Attributes:
        products: number of products, which all processes take together.
        memory: bytes of the basis and of the result, or of a product and its copy before there is
            a result.
        flops: number of floating-point operations on vectors.
        traffic: bytes of vectors that are read and written, at least.
        reductions: number of sums over processes, without those of products. Each has at most
            `max_basis` numbers, a few have its square. It is 0 for one process.
    """

    products: int
    memory: int
    flops: int
    traffic: int
    reductions: int


def eigsh_cost(
    n: int,
    k: int = 10,
    *,
    products: int | None = None,
    multiplicity_products: int = 10,
    max_basis: int | None = None,
    itemsize: int = 4,
    basis_itemsize: int | None = None,
    processes: int = 1,
) -> Cost:
    """Return the cost of `eigsh(op, k, max_basis=...)`, by counting its steps.

    Let l be the length of a slice. Orthogonalizing a product against j columns takes one pass, with
    4 l j flops and 2 l j elements read, and a short pass against the two columns before it; or two
    passes over all columns, with 8 l j flops and 3 l j elements, after a restart and during the
    check for repeated eigenvalues. A restart from m to s columns takes 2 l m s flops, and reads and
    writes m + s columns.

    A rounded basis takes one pass more for each product, and for its Gram matrix 2 l j flops and
    another reading; a restart takes twice the flops.

    Each `orthogonalize` takes one sum over processes for each pass and one for the norm. That makes
    4 sums for each product, or 3 where both passes go over all columns; 3 for the first start and 7
    for a start orthogonal to locked pairs, one for the scale and one for the result. The count is
    exact for one check for repeated eigenvalues that finds none, from random starts. A rounded
    basis takes one sum more for each `orthogonalize`, one for the error of a row, at most one for
    the Gram matrix of each product, and two for each restart.

    Args:
        n: dimension of the operator, >= 1.
        k: number of pairs.
        products: number of products with the operator; by default 3 k + multiplicity_products, as
            is usual for networks.
        multiplicity_products: number of those that check for repeated eigenvalues.
        max_basis: largest number of columns of the basis; by default that of `eigsh`.
        itemsize: bytes of an element.
        basis_itemsize: bytes of an element of the basis, 2 for float16; by default `itemsize`.
        processes: number of processes that hold a slice.

    Returns:
        The cost.

    Raises:
        ValueError: a size is out of its range.

    Example:
        >>> from eigenfilter.curvature import eigsh_cost
        >>> cost = eigsh_cost(n=10**9, k=10)
        >>> cost.products, f"{cost.memory / 1e9:.0f} GB"
        (40, '132 GB')
    """
    total = 3 * k + multiplicity_products if products is None else products
    stored = itemsize if basis_itemsize is None else basis_itemsize
    if min(n, k, itemsize, stored, processes) < 1 or not 0 <= multiplicity_products <= total:
        raise ValueError(
            "n, k, itemsize, processes must be >= 1, products >= multiplicity_products >= 0"
        )
    rounded = int(stored != itemsize)
    rows = min(default_basis(n, k, 1) if max_basis is None else max_basis, n)
    if rows < min(n, k + 4):
        raise ValueError(f"max_basis must be at least min(n, k + 4), not {rows}")
    length = -(-n // processes)
    flops, columns, vectors = 0, 0, 0  # of the basis, and beside it, a row of them
    reductions = 5 + 2 * rounded  # for the first start, the scale and the result
    if multiplicity_products:
        reductions += 7 + 4 * rounded
    thick = min(k + 2 + int(THICKNESS * max(rows - k - 2, 0)), rows - 1)  # after a restart
    check_start = total - multiplicity_products
    size, fresh = 0, True  # whether the next vector is not the new direction of a product
    for i in range(total):
        remaining = thick if size == rows else 0
        if i == check_start:
            remaining = k  # locked
        if remaining:
            flops += (2 + 2 * rounded) * size * remaining
            columns += size + remaining
            reductions += 2 * rounded
            size, fresh = remaining, True
        size += 1
        twice = fresh or i >= check_start or i == 1  # the product may lie along all columns
        flops += ((8 if twice else 4) + 6 * rounded) * size + (0 if twice else 8) + 4
        columns += ((3 if twice else 2) + 2 * rounded) * size + (0 if twice else 4)
        vectors += 8
        reductions += (3 + 2 * rounded if twice else 4 + 3 * rounded) + rounded
        fresh = False
    flops += 2 * size * k + size * size
    columns += size
    vectors += k
    return Cost(
        products=total,
        memory=length * (stored * (rows + 1) + itemsize * max(k, 2)),
        flops=flops * length,
        traffic=length * (stored * columns + itemsize * vectors),
        reductions=reductions if processes > 1 else 0,
    )
