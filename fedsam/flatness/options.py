"""What the command's flags say: measures and their options, known without loading torch."""

from typing import Any, NamedTuple

MEASURES = (
    *("fit", "slope", "hessian", "trace", "density"),
    *("sharpness", "sharpness-inf", "adaptive-sharpness", "adaptive-sharpness-inf"),
    *("average-sharpness", "average-sharpness-inf"),
    *("adaptive-average-sharpness", "adaptive-average-sharpness-inf"),
    *("surface-line", "surface"),
    *("corruptions", "weight-noise", "quantisation", "adversarial", "clients"),
)
COMPARISONS = ("plane", "connectivity")  # of several models
COHORT = "cohort"  # of clients that train: neither of one model nor of several that are there
QUICK = ("fit", "slope", "sharpness", "adaptive-sharpness", "hessian")


class Option(NamedTuple):
    """A flag of measures; which take it is in their signatures.

    Attributes
    ----------
    type : type
        int, float, str or bool.
    text : str
        What it means.
    default : str
        In words, as the signatures have it.
    """

    type: type[Any]
    text: str
    default: str


OPTIONS = {
    "on": Option(
        str,
        "train, test, client:K, clients (the mean over all clients, each on its own images) or "
        "clients:N (over N of them)",
        "train",
    ),
    "images": Option(
        int,
        "images at most, a seeded sample; 0: all",
        "512 of slope, hessian, trace, density, sharpness, average-sharpness; "
        "1000 of surface-line, adversarial, connectivity, cohort-spread; "
        "500 of surface, plane; 2000 of corruptions, weight-noise; 0 of quantisation",
    ),
    "rho": Option(float, "radius of sharpness", "by the ball"),
    "batch": Option(int, "m of m-sharpness; 0: all", "128"),
    "steps": Option(
        int,
        "of ascent, of Lanczos and of an attack",
        "30 of density; 20 of sharpness; 10 of adversarial",
    ),
    "eta": Option(float, "of adaptive sharpness", "0"),
    "weights_only": Option(bool, "T = 1 on biases, as ASAM trains", "none"),
    "normalize_logits": Option(
        bool, "sharpness of the loss of logits less their mean, divided by their norm", "none"
    ),
    "sigma": Option(float, "of average sharpness", "by the ball"),
    "eigenvalues": Option(int, "how many of the largest", "5"),
    "probes": Option(int, "random vectors", "10 of trace, average-sharpness; 3 of density"),
    "points": Option(
        int,
        "of a line, or of each axis of a surface",
        "21 of surface-line; 15 of surface, plane; 11 of connectivity, cohort-spread",
    ),
    "reach": Option(float, "of surfaces, filter-normalised", "1"),
    "directions": Option(int, "of surface-line", "3"),
    "margin": Option(float, "around a plane's models", "0.3"),
    "update_bn": Option(
        int,
        "training images on which BatchNorm's statistics are computed anew at each point of a "
        "line, plane or surface; 0: kept",
        "0",
    ),
    "folder": Option(
        str, "CIFAR-10-C's files, for corruptions; without it they are made here", "none"
    ),
    "baseline": Option(
        str, "a run whose corruption errors are the unit of mCE, once they were measured", "none"
    ),
    "draws": Option(int, "of weight-noise", "10"),
}
