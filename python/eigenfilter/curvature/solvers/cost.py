"""What `eigsh` takes beside the products, by the sizes of the problem."""

from __future__ import annotations

from dataclasses import dataclass

from eigenfilter.curvature.solvers.eigsh import THICKNESS, default_basis


@dataclass(frozen=True)
class Cost:
    """What one process takes, products with the operator left out.

    Attributes:
        products: taken by all processes together.
        memory: bytes: the basis, and the result, or a product and its copy before there is one.
        flops: floating-point operations on vectors.
        traffic: bytes that vectors are read and written, at least.
        reductions: sums over processes, of at most `max_basis` numbers each but for a few of its
            square, those of products left out; 0 for one process.
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
    """Return what `eigsh(op, k, max_basis=...)` takes, by counting its steps.

    Against j columns of the basis a product takes one pass, 4 l j flops and 2 l j elements read,
    and another against the two columns before it; or two passes over all, 8 l j flops and 3 l j
    elements, after a restart and while copies are looked for. A restart from m to s columns takes
    2 l m s flops, and m + s columns are read and written. l is the length of a slice.

    A rounded basis takes one pass more a product, and its Gram matrix 2 l j flops and another
    reading; a restart twice the flops.

    Each `project_out` takes a sum over processes a pass and one for the norm: 4 sums a product, or
    3 where two passes are over all; 3 begin a sequence, 7 beside locked pairs, one is for the
    scale and one for the result. That is exact for one look for copies that finds none, from
    random starts. A rounded basis takes one more a `project_out`, one for the error of a row, at
    most one for the Gram matrix a product and two a restart.

    Args:
        n: the dimension, >= 1.
        k: how many pairs.
        products: of the operator; by default 3 k + multiplicity_products, which is usual for networks.
        multiplicity_products: those of them that look for copies.
        max_basis: m; by default that of `eigsh`.
        itemsize: bytes of an element.
        basis_itemsize: bytes of an element of the basis, 2 for float16; by default `itemsize`.
        processes: how many hold a slice.

    Raises:
        ValueError: a size is out of its range.
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
    reductions = 5 + 2 * rounded  # of the first start, the scale and the result
    if multiplicity_products:
        reductions += 7 + 4 * rounded
    size, fresh = 0, True  # whether the next vector was not a product's child
    for i in range(total):
        looking = i >= total - multiplicity_products
        kept = min(k + 2 + int(THICKNESS * max(rows - k - 2, 0)), rows - 1)
        turned = (
            k if looking and i == total - multiplicity_products else kept if size == rows else 0
        )
        if turned:
            flops, columns = flops + (2 + 2 * rounded) * size * turned, columns + size + turned
            reductions += 2 * rounded
            size, fresh = turned, True
        size += 1
        twice = fresh or looking or i == 1  # that product may lie along all there is
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
