"""A Gaussian process whose function changes with time, and where to try it next."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LENGTH_SCALES = (0.1, 0.2, 0.4, 0.8, 1.6)
_FORGETTING = (0.001, 0.01, 0.05, 0.2, 0.5)
_NOISE = (0.01, 0.1, 0.5)


@dataclass(frozen=True, kw_only=True)
class TimeVaryingProcess:
    """A zero-mean process with the kernel of Parker-Holder et al. 2020 (equation 5; Bogunovic et
    al. 2016): variance * exp(-|x - x'|^2 / 2 length_scale^2) * (1 - forgetting)^(|t - t'| / 2).

    Points are rows [x..., t]: the features, then the time.
    """

    points: Array
    """[n, d + 1]"""
    values: Array
    """[n]"""
    length_scale: float
    forgetting: float
    noise: float
    """Variance of the noise, as a share of `variance`."""
    variance: float

    @classmethod
    def fit(cls, points: Array, values: Array) -> TimeVaryingProcess:
        """The process of greatest marginal likelihood, of some length scales, rates of forgetting
        and shares of noise; the variance that goes best with each is known in closed form."""
        best, likelihood = None, -np.inf
        for length_scale, forgetting, noise in itertools.product(
            _LENGTH_SCALES, _FORGETTING, _NOISE
        ):
            kernel = _correlation(points, points, length_scale, forgetting)
            factor = np.linalg.cholesky(kernel + noise * np.eye(len(points)))
            whitened = np.linalg.solve(factor, values)
            variance = max(float(whitened @ whitened) / len(values), 1e-12)
            log_determinant = 2 * float(np.log(np.diag(factor)).sum())
            found = -0.5 * (len(values) * np.log(variance) + log_determinant)
            if found > likelihood:
                likelihood = found
                best = cls(
                    points=points,
                    values=values,
                    length_scale=length_scale,
                    forgetting=forgetting,
                    noise=noise,
                    variance=variance,
                )
        assert best is not None
        return best

    def mean(self, at: Array) -> Array:
        """Expected values at points [m, d + 1]; shape [m]."""
        weights = np.linalg.solve(
            self._covariance(self.points, self.points, noise=self.noise), self.values
        )
        expected: Array = self._covariance(at, self.points) @ weights
        return expected

    def deviation(self, at: Array, *, pending: Array) -> Array:
        """Standard deviations at points [m, d + 1], as if the values at the `pending` points
        [p, d + 1] were known too; shape [m]."""
        known = np.concatenate([self.points, pending])
        cross = self._covariance(at, known)
        explained = np.linalg.solve(self._covariance(known, known, noise=self.noise), cross.T)
        variances = self.variance - np.einsum("mn,nm->m", cross, explained)
        deviations: Array = np.sqrt(np.maximum(variances, 0.0))
        return deviations

    def _covariance(self, left: Array, right: Array, *, noise: float = 0.0) -> Array:
        kernel = _correlation(left, right, self.length_scale, self.forgetting)
        return self.variance * (kernel + noise * np.eye(*kernel.shape))


def upper_confidence(process: TimeVaryingProcess, at: Array, *, pending: Array) -> Array:
    """mean + sqrt(beta) * deviation at points [m, d + 1], with beta = 0.2 + log(0.4 n) of
    Parker-Holder et al. 2020; shape [m].

    Values that are on their way at `pending` points lessen the deviation and leave the mean
    (Desautels et al. 2014).
    """
    beta = 0.2 + max(0.0, float(np.log(0.4 * len(process.values))))
    bounds: Array = process.mean(at) + np.sqrt(beta) * process.deviation(at, pending=pending)
    return bounds


def _correlation(left: Array, right: Array, length_scale: float, forgetting: float) -> Array:
    squared = ((left[:, None, :-1] - right[None, :, :-1]) ** 2).sum(axis=-1)
    apart = np.abs(left[:, None, -1] - right[None, :, -1])
    correlation: Array = np.exp(-squared / (2 * length_scale**2)) * (1 - forgetting) ** (apart / 2)
    return correlation
