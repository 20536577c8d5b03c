# SPDX-License-Identifier: Apache-2.0
"""Optimal k-means against exact arithmetic: all partitions, or a quadratic dynamic program.

The oracle knows the cost of every interval of the sorted values as a rational number. What the fit
reports must lie between the optimum and
    optimum * (1 + 1e-8) + sum of w * (half a unit in the last place of the entry)^2
The factor is the precision promised in csrc/cpu/fit_cluster.h; the sum is what rounding a mean to
float32 can cost, for moving a centre by d from its mean adds W d^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from qkern import _core
from qkern.errors import FormatError
from qkern.testing import address

TENSOR, ROW, GROUP = 0, 1, 2
CANARY = 0xA5


def fit(w: np.ndarray, bits: int, per: int = ROW, group: int = 0, importance=None):
    """Codebook [tables, 2^bits], codes [N, K], errors [tables]."""
    n, k = w.shape
    tables = {TENSOR: 1, ROW: n, GROUP: n * -(-k // (group or k))}[per]
    codebook = np.full((tables, 2**bits), np.nan, np.float32)
    errors = np.full(tables, np.nan)
    stream = np.full((n, (k * bits + 7) // 8 + 2), CANARY, np.uint8)
    stride = 0 if importance is None or importance.ndim == 1 else importance.strides[0] // 4
    _core.fit_kmeans(
        address(w), n, k, w.strides[0] // 4, bits, per, group, address(importance), stride,
        address(codebook), address(stream), stream.shape[1], address(errors),
    )  # fmt: skip
    assert (stream[:, -2:] == CANARY).all()
    codes = np.zeros((n, k), np.uint8)
    _core.codes_unpack(address(stream), n, k, stream.shape[1], bits, address(codes), k)
    return codebook, codes, errors


def to_integers(values: np.ndarray) -> tuple[list[int], int]:
    """Integers and one exponent e: values are integers * 2^e, exactly."""
    fractions = [Fraction(float(v)) for v in values]
    exponent = max(f.denominator for f in fractions).bit_length() - 1
    return [int(f * 2**exponent) for f in fractions], -exponent


class Oracle:
    """Costs of the intervals of one segment's sorted values, from exact integer sums; each is
    rounded to float64 once, at the end. All are positive, so sums of them keep 1e-13."""

    def __init__(self, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        if weights is None or not weights.any():
            weights = np.ones_like(values)
        order = np.argsort(values, kind="stable")
        self.values, self.weights = values[order], weights[order]
        x, x_exponent = to_integers(self.values)
        w, w_exponent = to_integers(self.weights)
        self.exponent = 2 * x_exponent + w_exponent
        pairs = list(zip(x, w, strict=True))
        self.w = list(itertools.accumulate((w for _, w in pairs), initial=0))
        self.wx = list(itertools.accumulate((w * x for x, w in pairs), initial=0))
        self.wxx = list(itertools.accumulate((w * x * x for x, w in pairs), initial=0))
        n = len(x)
        self.cost = np.full((n + 1, n + 1), np.inf)
        for i in range(n + 1):
            for j in range(i, n + 1):
                self.cost[i, j] = self.interval(i, j)

    def interval(self, i: int, j: int) -> float:
        w, wx, wxx = (s[j] - s[i] for s in (self.w, self.wx, self.wxx))
        return np.ldexp((w * wxx - wx * wx) / w, self.exponent) if w else 0.0

    def brute_force(self, k: int) -> float:
        n = len(self.values)
        if k >= n:
            return 0.0
        return min(
            sum(self.cost[a, b] for a, b in itertools.pairwise((0, *cuts, n)))
            for cuts in itertools.combinations(range(1, n), k - 1)
        )

    def quadratic(self, k: int) -> float:
        """k layers over all pairs; clusters may be empty, for fewer values than clusters."""
        best = self.cost[0]
        for _ in range(k - 1):
            best = (best[:, None] + self.cost).min(axis=0)
        return float(best[-1])

    def error(self, table: np.ndarray) -> float:
        """Of a table, every value at the entry nearest to it."""
        entries = table[nearest(self.values, table)]
        terms = zip(self.values, self.weights, entries, strict=True)
        exact = (Fraction(float(w)) * (Fraction(float(x)) - Fraction(float(t))) ** 2
                 for x, w, t in terms)  # fmt: skip
        return float(sum(exact))

    def rounding(self, table: np.ndarray) -> float:
        """What rounding the means may cost; a cluster of one value has no mean to round."""
        entry = table[nearest(self.values, table)]
        mixed = np.isin(entry, entry[self.values != entry])
        half = np.spacing(np.abs(entry[mixed])).astype(np.float64) / 2
        return float((self.weights[mixed] * half**2).sum())

    def check(self, optimum: float, table: np.ndarray, error: float) -> None:
        assert (np.diff(table) >= 0).all()
        assert error == pytest.approx(self.error(table), rel=1e-12, abs=0)
        assert optimum * (1 - 1e-12) <= error <= optimum * (1 + 1e-8) + self.rounding(table)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Ties to the lower entry; of equal entries the first. Long doubles tell the sides apart."""
    distance = np.abs(values.astype(np.longdouble)[:, None] - table.astype(np.longdouble))
    return distance.argmin(axis=1)


def check_rows(w: np.ndarray, bits: int, importance=None, exact: bool = False) -> None:
    codebook, codes, errors = fit(w, bits, ROW, 0, importance)
    for row, values in enumerate(w):
        weights = importance[row] if importance is not None and importance.ndim == 2 else importance
        oracle = Oracle(values, weights)
        optimum = oracle.brute_force(2**bits) if exact else oracle.quadratic(2**bits)
        oracle.check(optimum, codebook[row], errors[row])
        assert np.array_equal(codes[row], nearest(values, codebook[row]))


def rows_of(n: int, seed: int) -> np.ndarray:
    """Kinds of values that tables are fitted to, and kinds that break fits."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(n)
    islands = rng.choice([-1000.0, -1, 0, 1, 1000], n) + normal * 1e-3
    rows = [
        normal,
        rng.uniform(-1, 1, n),
        rng.standard_cauchy(n),
        np.exp(normal * 8),
        rng.integers(-4, 5, n),  # many duplicates
        np.arange(n),  # cost falls in straight lines: no penalty gives every count
        np.arange(n) // 2 * 3.0,
        np.concatenate([np.arange(n - n // 3), np.arange(n // 3) + 1000.0]),
        islands,
        np.where(rng.random(n) < 0.7, 0.0, normal),
        normal * 1e-38,
        normal * 1e-44,  # subnormal
        normal * 1e37,
        1 + normal * 1e-6,  # a few units in the last place
        np.full(n, 0.3),
    ]
    return np.array(rows).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("bits", "n"), [(1, 12), (2, 9), (2, 13), (3, 10), (3, 13), (2, 3)])
def test_against_all_partitions(bits: int, n: int, weighted: bool) -> None:
    for seed in range(4):
        w = rows_of(n, 100 * bits + seed)
        importance = None
        if weighted:
            rng = np.random.default_rng(seed)
            importance = np.exp(rng.standard_normal(w.shape) * 2).astype(np.float32)
        check_rows(w, bits, importance, exact=True)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("bits", "n"), [(2, 150), (3, 150), (4, 17), (4, 60), (4, 200), (5, 90), (8, 257), (8, 300)]
)
def test_against_quadratic_programming(bits: int, n: int, weighted: bool) -> None:
    w = rows_of(n, bits * n)
    w = w[: 9 if n > 250 else len(w)]
    importance = None
    if weighted:
        importance = np.random.default_rng(n).uniform(0, 1, n).astype(np.float32)
        importance[:: 7 if n > 60 else n] = 0
    check_rows(w, bits, importance)


@pytest.mark.parametrize("n", range(5, 40))
def test_evenly_spaced_values_need_spliced_paths(n: int) -> None:
    """F(k) is linear between many of its points, so no penalty gives these k clusters."""
    w = np.arange(n, dtype=np.float32)[None]
    for bits in (1, 2, 3, 4):
        _, _, errors = fit(w, bits)
        quotient, longer = divmod(n, 2**bits)

        def cost(m: int) -> float:
            return (m**3 - m) / 12  # of m consecutive integers

        balanced = longer * cost(quotient + 1) + (2**bits - longer) * cost(quotient)
        assert errors[0] == pytest.approx(balanced, rel=1e-12)


def test_tight_clusters_beside_a_heavy_distant_one() -> None:
    """The costs that matter are 1e-16 of the squares summed: float64 prefix sums lose them."""
    rng = np.random.default_rng(5)
    near = rng.uniform(-1e-5, 1e-5, 30)
    far = 1010 + np.array([0, 0.01, 0.03, 0.04, 0.09, 0.1, 0.15, 0.17, 0.2, 0.24])
    values = np.concatenate([near, [1000.0], far]).astype(np.float32)
    importance = np.ones_like(values)
    importance[:30], importance[30] = 1e-3, 1e7
    check_rows(values[None], 3, importance)


def test_values_and_importance_over_many_magnitudes() -> None:
    """Which cut is better must not be read off from costs that one distant value dominates."""
    rng = np.random.default_rng(77)
    for _ in range(60):
        n = int(rng.integers(17, 45))
        spread, weight_spread = rng.uniform(8, 12), rng.uniform(4, 8)
        w = np.exp(rng.standard_normal((1, n)) * spread).astype(np.float32)
        check_rows(w, 4, np.exp(rng.standard_normal((1, n)) * weight_spread).astype(np.float32))


def test_entries_are_the_rounded_means_of_their_values() -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((3, 500)).astype(np.float32)
    importance = rng.uniform(0, 2, (3, 500)).astype(np.float32)
    codebook, codes, _ = fit(w, 4, importance=importance)
    for row in range(3):
        for entry in range(16):
            here = codes[row] == entry
            wide = importance[row, here].astype(np.longdouble)
            mean = (wide * w[row, here]).sum() / wide.sum()
            assert abs(codebook[row, entry] - mean) <= np.spacing(np.abs(codebook[row, entry])) / 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fewer_distinct_values_than_entries(bits: int) -> None:
    """The entries are the values, ascending, and the last repeats; 0 and -0 are one value."""
    distinct = np.linspace(-1, 1, 2**bits - 1, dtype=np.float32)
    rng = np.random.default_rng(bits)
    w = np.stack([np.resize(distinct, 700), np.resize(np.float32([0.0, -0.0, 3]), 700)])
    rng.shuffle(w, axis=1)
    codebook, codes, errors = fit(w, bits)
    assert np.array_equal(codebook[0], [*distinct, distinct[-1]])
    assert np.array_equal(codebook[1], [0, *[3] * (2**bits - 1)])
    assert not np.signbit(codebook[1]).any()
    assert not errors.any()
    assert np.array_equal(np.take_along_axis(codebook, codes.astype(int), 1), w)
    assert set(codes[1]) == {0, 1}


def test_importance_0_takes_no_part_unless_it_is_0_everywhere() -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((2, 64)).astype(np.float32)
    importance = np.ones((2, 64), np.float32)
    importance[0, ::2] = 0
    importance[1] = 0
    importance[1, 3] = -0.0
    codebook, codes, errors = fit(w, 3, importance=importance)
    odd, _, odd_errors = fit(np.ascontiguousarray(w[:1, 1::2]), 3)
    plain, plain_codes, plain_errors = fit(w[1:], 3)
    assert np.array_equal(codebook, [odd[0], plain[0]])
    assert np.array_equal(errors, [odd_errors[0], plain_errors[0]])
    assert np.array_equal(codes[1], plain_codes[0])
    assert np.array_equal(codes[0], nearest(w[0], codebook[0]))


def test_scaling_the_importance_or_the_values_by_powers_of_two_changes_nothing() -> None:
    rng = np.random.default_rng(8)
    w = rng.standard_t(3, (2, 400)).astype(np.float32)
    importance = rng.uniform(0.1, 1, 400).astype(np.float32)
    codebook, codes, errors = fit(w, 4, importance=importance)
    for shift in (-100, 90):
        scale = np.float32(2.0**shift)
        book, same, scaled = fit(w * scale, 4, importance=importance / scale)
        assert np.array_equal(same, codes) and np.array_equal(book, codebook * scale)
        assert np.array_equal(scaled, errors * float(scale))


# ---- segments, strides, threads ----


@pytest.fixture
def wide() -> np.ndarray:
    return np.random.default_rng(9).standard_normal((7, 150)).astype(np.float32)


@pytest.mark.parametrize("per_row", [False, True], ids=["shared importance", "own importance"])
@pytest.mark.parametrize("group", [64, 33, 130])
def test_groups_are_fitted_on_their_own(wide: np.ndarray, group: int, per_row: bool) -> None:
    w = wide[:, :130]
    shape = (7, 150) if per_row else (130,)
    importance = np.random.default_rng(10).uniform(0, 1, shape).astype(np.float32)
    codebook, codes, errors = fit(w, 3, GROUP, group, importance[..., :130])
    table = 0
    for row in range(7):
        for start in range(0, 130, group):
            columns = slice(start, min(start + group, 130))
            part = np.ascontiguousarray(w[row : row + 1, columns])
            own = np.ascontiguousarray((importance[row] if per_row else importance)[columns])
            alone_book, alone_codes, alone_error = fit(part, 3, ROW, 0, own)
            assert np.array_equal(codebook[table], alone_book[0])
            assert np.array_equal(codes[row, columns], alone_codes[0])
            assert errors[table] == alone_error[0]
            table += 1
    assert table == len(codebook)


def test_one_table_for_the_tensor(wide: np.ndarray) -> None:
    w = wide[:, :130]
    importance = np.random.default_rng(11).uniform(0, 1, 130).astype(np.float32)
    flat = np.ascontiguousarray(w).reshape(1, -1)
    for weights, repeated in ((None, None), (importance, np.tile(importance, 7))):
        codebook, codes, errors = fit(w, 4, TENSOR, 0, weights)
        alone_book, alone_codes, alone_error = fit(flat, 4, ROW, 0, repeated)
        assert np.array_equal(codebook, alone_book) and np.array_equal(errors, alone_error)
        assert np.array_equal(codes.reshape(1, -1), alone_codes)


@pytest.fixture
def all_threads() -> Iterator[None]:
    yield
    _core.set_threads(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_threads_and_neighbours_change_nothing(bits: int, all_threads: None) -> None:
    rng = np.random.default_rng(bits)
    w = rng.standard_t(4, (23, 1500)).astype(np.float32)
    results = []
    for threads in (1, 3):
        _core.set_threads(threads)
        results.append([*fit(w, bits), *fit(w, bits, GROUP, 600), *fit(w, bits, TENSOR)])
    for one, three in zip(*results, strict=True):
        assert one.tobytes() == three.tobytes()
    alone = fit(w[17:18], bits)
    assert all(np.array_equal(a[0], r[17]) for a, r in zip(alone, results[0][:3], strict=True))


@pytest.mark.parametrize(("bits", "n"), [(4, 5000), (2, 20000), (8, 30000)])
def test_long_segments_are_no_worse_than_lloyd_from_many_starts(bits: int, n: int) -> None:
    """Several coarse levels, out of the reach of the oracle: no start of Lloyd's finds better."""
    rng = np.random.default_rng(bits)
    w = rng.standard_t(5, n).astype(np.float32)
    _, _, errors = fit(w[None], bits)
    x = np.sort(w.astype(np.float64))
    s1, s2 = (np.concatenate([[0], np.cumsum(x**p)]) for p in (1, 2))
    for start in range(10):
        low = 0.02 * start / 2**bits
        centres = np.unique(np.quantile(x, np.linspace(low, 1 - low, 2**bits)))
        for _ in range(300):
            cuts = np.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
            cuts = np.unique(np.concatenate([[0], cuts, [n]]))
            counts = np.diff(cuts)
            centres = np.diff(s1[cuts]) / counts
        found = (np.diff(s2[cuts]) - np.diff(s1[cuts]) ** 2 / counts).sum()
        assert errors[0] <= found * (1 + 1e-9)


# ---- refusals ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    w = np.ones((9, 40), np.float32)
    w[4, 33], w[6, 0] = bad, np.nan
    for per in (TENSOR, ROW, GROUP):
        with pytest.raises(FormatError, match=f"in w, got {bad} in row 4, column 33"):
            fit(w, 2, per, 16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, -1e-45])
def test_importance_that_is_no_weight(bad: float) -> None:
    w = np.ones((9, 40), np.float32)
    own, shared = np.ones((9, 40), np.float32), np.ones(40, np.float32)
    own[8, 39] = shared[5] = bad
    with pytest.raises(FormatError, match=r"non-negative.*importance.*row 8, column 39"):
        fit(w, 2, importance=own)
    with pytest.raises(FormatError, match=r"non-negative.*importance.*row 0, column 5"):
        fit(w, 2, importance=shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "expected 1 to 8 bits, got 0"),
        ({"bits": 9}, "expected 1 to 8 bits, got 9"),
        ({"table_per": 5}, "table_per must be"),
        ({"group": 17}, "group of 1 to 16 columns .*, got 17"),
        ({"w": 0}, "w is NULL"),
        ({"codebook": 0}, "codebook is NULL"),
        ({"codes": 0}, "codes is NULL"),
        ({"n": 0, "table_per": TENSOR}, "at least one weight"),
        ({"k": 0}, "at least one weight"),
        ({"w_stride": 3}, "rows of w are 16 long but only 3 apart"),
        ({"codes_stride_bytes": 3}, "rows of codes are 4 long but only 3 apart"),
        ({"importance_row_stride": 4}, "rows of importance are 16 long but only 4 apart"),
    ],
)
def test_senseless_arguments(change: dict[str, int], message: str) -> None:
    w, codebook, out = np.ones((2, 16), np.float32), np.ones(32, np.float32), np.ones(64, np.uint8)
    good = {
        "w": address(w), "n": 2, "k": 16, "w_stride": 16, "bits": 2, "table_per": GROUP, "group": 8,
        "importance": address(w), "importance_row_stride": 16, "codebook": address(codebook),
        "codes": address(out), "codes_stride_bytes": 4,
    }  # fmt: skip
    _core.fit_kmeans(**good)
    _core.fit_kmeans(**(good | {"n": 0}))
    with pytest.raises(ValueError, match=message):
        _core.fit_kmeans(**(good | change))
