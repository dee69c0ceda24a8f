"""The formulas as the papers have them, in numpy and float64, two passes and no tricks."""

import numpy as np


def class_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Means of the classes that have samples, ``(P, d)``."""
    features = features.astype(np.float64)
    return np.stack([features[labels == label].mean(0) for label in np.unique(labels)])


def residuals(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features less their class's mean, ``(N, d)``."""
    features = features.astype(np.float64)
    return features - class_means(features, labels)[np.searchsorted(np.unique(labels), labels)]


def centred_means(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class means less their mean, ``(P, d)``."""
    means = class_means(features, labels)
    return means - means.mean(0)


def sigma_w(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    residual = residuals(features, labels)
    return residual.T @ residual / len(features)


def sigma_b(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    centred = centred_means(features, labels)
    return centred.T @ centred / len(centred)


def nc1(features: np.ndarray, labels: np.ndarray) -> float:
    """trace(Sigma_W Sigma_B^+) / K (Papyan et al. 2020) through the singular vectors of the centred means."""
    means = class_means(features, labels)
    _, s, vt = np.linalg.svd((means - means.mean(0)) / np.sqrt(len(means)), full_matrices=False)
    rank = min(len(means) - 1, features.shape[1])
    inverse = vt[:rank].T @ np.diag(s[:rank] ** -2) @ vt[:rank]
    return float(np.trace(sigma_w(features, labels) @ inverse) / len(means))


def nc1_ratio(features: np.ndarray, labels: np.ndarray) -> float:
    """trace(Sigma_W) / trace(Sigma_B), the mean squared lengths of residuals and of centred means."""
    squares = [np.square(rows).sum(1).mean() for rows in (residuals(features, labels), centred_means(features, labels))]
    return float(squares[0] / squares[1])


def cdnv(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean over pairs of (Var_i + Var_j) / (2 |mu_i - mu_j|^2) (Galanti et al. 2022)."""
    features, means = features.astype(np.float64), class_means(features, labels)
    variances = [
        np.square(features[labels == label] - mean).sum(1).mean()
        for label, mean in zip(np.unique(labels), means, strict=True)
    ]
    pairs = [(i, j) for i in range(len(means)) for j in range(len(means)) if i != j]
    terms = [(variances[i] + variances[j]) / (2 * np.square(means[i] - means[j]).sum()) for i, j in pairs]
    return float(np.mean(terms))


def equinorm(features: np.ndarray, labels: np.ndarray) -> float:
    """Std over mean of the norms of the centred class means (Papyan et al. 2020, fig. 2)."""
    means = class_means(features, labels)
    norms = np.linalg.norm(means - means.mean(0), axis=1)
    return float(norms.std() / norms.mean())


def equiangularity(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean of |cos + 1/(K-1)| over pairs of centred class means (Papyan et al. 2020, fig. 4)."""
    means = class_means(features, labels)
    centred = means - means.mean(0)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(centred)
        for j, b in enumerate(centred)
        if i != j
    ]
    return float(np.mean(np.abs(np.array(cosines) + 1 / (len(means) - 1))))


def etf(classes: int) -> np.ndarray:
    """Gram matrix of a simplex ETF, of Frobenius norm 1."""
    return (np.eye(classes) - np.ones((classes, classes)) / classes) / np.sqrt(classes - 1)


def etf_distance(features: np.ndarray, labels: np.ndarray) -> float:
    """|G/|G| - ETF|_F for the Gram matrix G of the centred class means (Zhu et al. 2021)."""
    means = class_means(features, labels)
    gram = (means - means.mean(0)) @ (means - means.mean(0)).T
    return float(np.linalg.norm(gram / np.linalg.norm(gram) - etf(len(means))))


def self_duality(features: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> float:
    """|W/|W| - M/|M||_F^2 over the classes that have samples (Papyan et al. 2020, fig. 5)."""
    means = class_means(features, labels)
    centred = means - means.mean(0)
    rows = weight.astype(np.float64)[np.unique(labels)]
    return float(np.square(rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)).sum())
