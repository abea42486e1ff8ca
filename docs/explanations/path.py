"""The figure of the page about the integral along a path.

    python docs/explanations/path.py        writes path.svg beside this file

Data: two normal distributions on a line. Their score is known in closed form; a wrong term is added
to it, as a network's score is never exact. The probability-flow ODE of the VP process is solved by
Heun's method in sqrt(t) in a few equal steps, and the curve is the cubic that the method's values
and slopes define. The truth is that of the same ODE, solved in 20,000 steps.
"""

from pathlib import Path

import matplotlib.figure
import numpy as np

WRONG = 0.1  # size of the error of the score
BETA, CENTRES, WIDTH = (0.1, 20.0), np.array([-0.6, 0.6]), 0.15
X, EPS = 0.3, 1e-3
INK, BLUE, ORANGE = "#7d838c", "#2f8fd8", "#e0662b"  # readable on white and on black


def model(x, t):
    """The score s(x, t) with its error, and ds/dx."""
    b = BETA[0] * t + (BETA[1] - BETA[0]) * t**2 / 2
    alpha, variance = (
        a[..., None] for a in np.broadcast_arrays(np.exp(-b / 2), 1 - np.exp(-b), x)[:2]
    )
    variance = variance + alpha**2 * WIDTH**2
    slopes = -(x[..., None] - alpha * CENTRES) / variance
    share = np.exp(-variance * slopes**2 / 2)
    share /= share.sum(-1, keepdims=True)
    score = (share * slopes).sum(-1)
    curvature = (share * (slopes**2 - 1 / variance)).sum(-1) - score**2
    return score + WRONG * np.sin(3 * x), curvature + 3 * WRONG * np.cos(3 * x)


def field(u, x):
    """dx/du of the ODE, its divergence d/dx, and the score, with t = u^2."""
    t = u**2
    beta = BETA[0] + (BETA[1] - BETA[0]) * t
    score, curvature = model(x, t)
    return -u * beta * (x + score), -u * beta * (1 + curvature), score


def heun(steps):
    """Knots u, values and slopes of the solution from X in equal steps of u = sqrt(t)."""
    u = np.linspace(EPS**0.5, 1, steps + 1)
    x = np.array([X])
    xs, slopes = [x], [field(u[0], x)[0]]
    for a, b in zip(u[:-1], u[1:], strict=True):
        predicted = x + (b - a) * slopes[-1]
        x = x + (b - a) / 2 * (slopes[-1] + field(b, predicted)[0])
        xs.append(x)
        slopes.append(field(b, x)[0])
    return u, np.concatenate(xs), np.concatenate(slopes)


def curve(steps, points=400):
    """u, c(u) and dc/du of the cubic Hermite curve, at Gauss points with weights."""
    u, x, slope = heun(steps)
    node, weight = np.polynomial.legendre.leggauss(max(4, points // steps))
    s, weight = (node + 1) / 2, weight / 2
    h = np.diff(u)[:, None]
    x0, x1, d0, d1 = x[:-1, None], x[1:, None], h * slope[:-1, None], h * slope[1:, None]
    c = x0 + s * d0 + s**2 * (3 * (x1 - x0) - 2 * d0 - d1) + s**3 * (2 * (x0 - x1) + d0 + d1)
    dc = (d0 + 2 * s * (3 * (x1 - x0) - 2 * d0 - d1) + 3 * s**2 * (2 * (x0 - x1) + d0 + d1)) / h
    return (u[:-1, None] + h * s).ravel(), c.ravel(), dc.ravel(), (h * weight).ravel(), x[-1]


def log_density(steps):
    """log p(X) in nats, without and with the correction."""
    u, c, dc, weight, end = curve(steps)
    velocity, divergence, score = field(u, c)
    prior = -(end**2) / 2 - np.log(2 * np.pi) / 2
    plain = prior + np.sum(weight * divergence)
    return np.array([plain, plain - np.sum(weight * (dc - velocity) * score)])


def main() -> None:
    """Write the figure."""
    matplotlib.rcParams.update(
        {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
            **dict.fromkeys(("xtick.color", "ytick.color"), INK),
            **{"font.size": 10, "axes.spines.top": False, "axes.spines.right": False},
            **{"svg.hashsalt": "path", "legend.frameon": False, "lines.linewidth": 1.8},
        }
    )
    figure = matplotlib.figure.Figure(figsize=(7.4, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    for steps, colour, label in ((2000, BLUE, "the ODE"), (8, ORANGE, "a solver's curve, 8 steps")):
        u, c, *_ = curve(steps, max(400, steps))
        left.plot(u, c, color=colour, label=label)
    u, x, _ = heun(8)
    left.plot(u, x, "o", color=ORANGE, markersize=4)
    left.set(xlabel=r"$\sqrt{t}$", ylabel="x", title="from the data to the prior")
    left.legend()
    counts = np.array([4, 6, 8, 12, 16, 24, 32, 48, 64])
    found = np.abs([log_density(n) - log_density(20_000)[1] for n in counts])
    right.loglog(counts, found[:, 0], "o-", color=ORANGE, label="without the correction")
    right.loglog(counts, found[:, 1], "o-", color=BLUE, label="with the correction")
    right.set(xlabel="steps", ylabel="error, nats", title=r"error of $\log p(x)$", ylim=(1e-6, 1))
    right.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    right.minorticks_off()
    right.legend()
    path = Path(__file__).with_suffix(".svg")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    for n, (plain, corrected) in zip(counts, found, strict=True):
        print(f"{n} steps: {plain:.1e} nats without the correction, {corrected:.1e} with it")


if __name__ == "__main__":
    main()
