"""Directions between two sides of activations, by streaming over blocks of rows.

Shapes: L layers, D hidden width. An estimator sweeps once or a few times over a source's fitting
rows and keeps only sums of shape (L, D) or a few of them, so memory does not grow with the rows.
All return unit directions (L, D) that point towards harm.

Adding one: a function of a `Contrast` here, a line in `ESTIMATORS`, a test with a planted
direction. Another package adds such a function by an entry point of group `spo.estimators`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spo import plugins
from spo.draws import share_of
from spo.errors import DataError

if TYPE_CHECKING:
    from spo.config import EstimateConfig

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Keep = Callable[[str], bool]
"""Whether a row with this id takes part."""

_SUBSPACE = 4  # columns of the block power iteration: a gap below the second component is enough
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Some rows of one source."""

    ids: Sequence[str]
    """(n,) row ids; they decide which rows are held out."""
    harm: NDArray[np.bool_]
    """(n,) True on the harmful side."""
    values: Floats
    """(n, L, D) pooled activations."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contrast:
    """Pooled activations of one source, readable as often as needed."""

    source: str
    weight: float
    blocks: Callable[[], Iterator[Block]]

    @classmethod
    def of_arrays(
        cls,
        source: str,
        harm: Floats,
        safe: Floats,
        *,
        weight: float = 1.0,
        ids: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> Contrast:
        """A contrast in memory: (N, L, D) harmful and (M, L, D) harmless rows."""
        names = ids or (
            [f"{source}-harm-{i}" for i in range(len(harm))],
            [f"{source}-safe-{i}" for i in range(len(safe))],
        )
        sides = ((harm, True, names[0]), (safe, False, names[1]))

        def blocks() -> Iterator[Block]:
            for rows, is_harm, row_ids in sides:
                for start in range(0, len(rows), 32):
                    part = rows[start : start + 32]
                    yield Block(
                        ids=row_ids[start : start + 32],
                        harm=np.full(len(part), is_harm),
                        values=part,
                    )

        return cls(source=source, weight=weight, blocks=blocks)


@dataclass(slots=True, kw_only=True, eq=False)
class Moments:
    """Counts and sums of both sides."""

    count: NDArray[np.int64]
    """(2,) rows of the harmless and the harmful side."""
    total: Doubles
    """(2, L, D)."""
    squares: Doubles
    """(L,) sum over rows and units of the squares, both sides."""

    @property
    def means(self) -> Doubles:
        """(2, L, D) harmless and harmful mean."""
        means: Doubles = self.total / np.maximum(self.count, 1)[:, None, None]
        return means

    @property
    def difference(self) -> Doubles:
        """(L, D) harmful minus harmless mean."""
        return self.means[1] - self.means[0]


def is_held_out(row_id: str, share: float) -> bool:
    """Whether a row belongs to the held-out share; depends on its id alone."""
    return share_of(row_id) < share


def in_first_half(row_id: str) -> bool:
    """Splits rows into halves, independently of `is_held_out`."""
    return share_of("half/" + row_id) < 0.5


def moments(contrast: Contrast, keep: Keep) -> Moments:
    """One sweep; DataError where values are not finite or a side has fewer than two rows."""
    found: Moments | None = None
    for harm, values in kept_rows(contrast, keep):
        if found is None:
            shape = values.shape[1:]
            found = Moments(
                count=np.zeros(2, dtype=np.int64),
                total=np.zeros((2, *shape)),
                squares=np.zeros(shape[0]),
            )
        for side in (0, 1):
            part = values[harm == bool(side)]
            found.count[side] += len(part)
            found.total[side] += part.sum(axis=0, dtype=np.float64)
        found.squares += np.einsum("nld,nld->l", values, values, dtype=np.float64)
    counts = [0, 0] if found is None else found.count.tolist()
    if found is None or min(counts) < 2:
        raise DataError(
            f"source {contrast.source!r} has {counts[1]} harmful and {counts[0]} harmless rows "
            "here, too few; give at least 10 of each"
        )
    return found


def kept_rows(contrast: Contrast, keep: Keep) -> Iterator[tuple[NDArray[np.bool_], Floats]]:
    """(harm, values) of the rows that take part, block by block."""
    for block in contrast.blocks():
        if not np.isfinite(block.values).all():
            raise DataError(
                f"source {contrast.source!r} has activations that are not finite; "
                "extract it again in float32"
            )
        chosen = np.fromiter((keep(row_id) for row_id in block.ids), dtype=bool)
        if chosen.any():
            yield block.harm[chosen], block.values[chosen]


def mean_difference(contrast: Contrast, keep: Keep, config: EstimateConfig) -> Floats:
    """Unit difference of means, harm minus safe (CAA, arXiv 2312.06681)."""
    return unit_rows(moments(contrast, keep).difference)


def pca(contrast: Contrast, keep: Keep, config: EstimateConfig) -> Floats:
    """Leading principal component of the rows of both sides (RepE, arXiv 2310.01405).

    Rows are centred at the midpoint of the two means and the sides weigh the same; block power
    iteration, `config.passes` sweeps; the sign is that of the mean difference.
    """
    found = moments(contrast, keep)
    centre = found.means.mean(axis=0)
    weights = (0.5 / found.count).tolist()
    generator = np.random.default_rng(0)
    layers, width = centre.shape
    basis = generator.standard_normal((layers, width, min(_SUBSPACE, width)))
    basis[:, :, 0] = unit_rows(found.difference)  # refuses sides that do not differ
    for _ in range(config.passes):
        basis = np.linalg.qr(basis)[0]
        product = np.zeros_like(basis)
        for harm, values in kept_rows(contrast, keep):
            rows = values - centre
            share = np.where(harm, weights[1], weights[0])
            shadow = np.einsum("nld,ldk->nlk", rows, basis, optimize=True)
            product += np.einsum("n,nld,nlk->ldk", share, rows, shadow, optimize=True)
        # Rayleigh-Ritz: rotate so that the first column is the leading component.
        inner = np.einsum("ldk,ldm->lkm", basis, product)
        _, rotation = np.linalg.eigh((inner + inner.transpose(0, 2, 1)) / 2)
        basis = product @ rotation[:, :, ::-1]
    leading = unit_rows(basis[:, :, 0]).astype(np.float64)
    signs = np.sign((leading * found.difference).sum(axis=1, keepdims=True))
    return unit_rows(leading * np.where(signs == 0, 1.0, signs))


def linear_probe(contrast: Contrast, keep: Keep, config: EstimateConfig) -> Floats:
    """Unit normal of a ridge-regularised linear classifier (Fisher's discriminant).

    Solves (S + r I) w = mean(harm) - mean(safe), S the within-side covariance, by conjugate
    gradients: `config.passes` sweeps. r = `config.shrinkage` x the mean variance of a unit.
    """
    found = moments(contrast, keep)
    means, total = found.means, int(found.count.sum())
    spread = found.squares - np.einsum("s,sld,sld->l", found.count.astype(float), means, means)
    ridge = config.shrinkage * np.maximum(spread / (total * means.shape[2]), _TINY)

    def apply(direction: Doubles) -> Doubles:
        product = ridge[:, None] * direction
        for harm, values in kept_rows(contrast, keep):
            rows = values - means[harm.astype(int)]
            shadow = np.einsum("nld,ld->nl", rows, direction)
            product += np.einsum("nl,nld->ld", shadow, rows) / total
        return product

    solution = np.zeros_like(found.difference)
    residual = found.difference.copy()
    search, power = residual.copy(), (residual**2).sum(axis=1)
    for _ in range(config.passes):
        image = apply(search)
        step = power / np.maximum((search * image).sum(axis=1), _TINY)
        solution += step[:, None] * search
        residual -= step[:, None] * image
        fresh = (residual**2).sum(axis=1)
        search = residual + (fresh / np.maximum(power, _TINY))[:, None] * search
        power = fresh
    return unit_rows(solution)


def unit_rows(rows: Doubles) -> Floats:
    """Rows scaled to norm 1; a zero row (sides that do not differ) raises DataError."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.all(norms > 1e-9):
        dead = np.flatnonzero(norms[..., 0] <= 1e-9).tolist()
        raise DataError(
            f"both sides have the same mean activation at layer rows {dead}: no direction; "
            "check that the harmful and the harmless rows are different texts"
        )
    return (rows / norms).astype(np.float32)


def estimator_of(config: EstimateConfig) -> Callable[[Contrast, Keep, EstimateConfig], Floats]:
    """The configured estimator, built in or added by another package."""
    found: Callable[[Contrast, Keep, EstimateConfig], Floats]
    found = plugins.find(plugins.ESTIMATORS, config.method)
    return found


ESTIMATORS: dict[str, Callable[[Contrast, Keep, EstimateConfig], Floats]] = {
    "mean_difference": mean_difference,
    "pca": pca,
    "linear_probe": linear_probe,
}


def projections(
    contrast: Contrast, keep: Keep, directions: Iterable[Floats]
) -> tuple[NDArray[np.bool_], list[Floats]]:
    """((n,) harm, for each direction (n, L) projections) of the rows that take part; one sweep."""
    wanted = list(directions)
    sides: list[NDArray[np.bool_]] = []
    scores: list[list[Floats]] = [[] for _ in wanted]
    for harm, values in kept_rows(contrast, keep):
        sides.append(harm)
        for found, unit in zip(scores, wanted, strict=True):
            found.append(np.einsum("nld,ld->nl", values, unit).astype(np.float32))
    if not sides:
        raise DataError(f"source {contrast.source!r} has no rows to test on; give at least 10")
    return np.concatenate(sides), [np.concatenate(found) for found in scores]
