"""The theory on problems that are solved exactly: docs/theory.md has what they say.

    python benchmarks/theory.py --output_dir runs/theory [--quick] [--seeds 0 1 2 3 4]

Four parts, named in the column ``part`` of the results; the problems are those of `benchmarks/exact_problems.py`.

- ``solutions``: on a separable problem, the models of BDS and BMO by enumeration, by the package's selectors with each
  step solved exactly, and those of direct mixing.
- ``mixing``: the same problem, direct mixing at each rho.
- ``not_separable``: validation losses of BDS and BMO where rows cannot be fitted together.
- ``posterior``: `tamis.selection.calibration.fit` on scores of known distribution, for each seed.
- ``weights``: expected squared error of the weighted mean gradient, over that of the best weights.

The pictures are ``theory_mixing.png``, ``theory_not_separable.png`` and ``theory_posterior.png``.
"""

from pathlib import Path
from typing import Any

import numpy as np
from common import finish, make_parser
from exact_problems import (
    SCORE_PAIRS,
    Array,
    GradientNoise,
    MarginProblem,
    minimise_a_sum,
    refine,
    saturating_losses,
    select,
    select_mean,
    separable_problem,
    squared_losses,
    weakly_pareto,
)

from tamis.files import write_atomically
from tamis.selection.calibration import fit
from tamis.selection.make import make_row_weights

RHO = 0.5  # of the runs with the package's selectors; the solutions do not depend on it
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of right rows
NUM_TRAINING, NUM_VALIDATION = 4000, 64
NOISES = (1.0, 10.0, 100.0, 1000.0)  # variance of a row's gradient over the squared difference right - wrong


def solutions(problem: MarginProblem) -> list[dict[str, Any]]:
    """Who reaches which model."""
    ones, useful = np.ones(4), np.array([2.0, 2.0, 0.0, 0.0])
    best_rho = min(np.linspace(0, 1, 1001), key=lambda rho: problem.population_loss(problem.solve(ones, rho)))
    models = {
        "plain SFT (rho 0)": (ones, problem.solve(ones, 0.0)),
        f"direct mixing, best rho ({best_rho:.3f})": (ones, problem.solve(ones, best_rho)),
        "validation rows alone (rho 1)": (ones, problem.solve(ones, 1.0)),
        "BDS by enumeration": (useful, problem.solve(useful, RHO)),
        "softmax": select(problem, make_row_weights("softmax", 4, learning_rate=0.2), RHO, 400),
        "mirror": select(problem, make_row_weights("mirror", 4, score_map="softmax"), RHO, 100),
    }
    for temperature in (0.5, 0.02):
        weights = make_row_weights("bmo", 4, score_map="softmax", temperature=temperature)
        models[f"bmo, tau {temperature}"] = select(problem, weights, RHO, 100)
    rows = [
        {
            "part": "solutions",
            "method": method,
            "useless_share": None if method.startswith("validation rows") else float(weight_N[2:].sum() / 4),
            **losses(problem, theta),
        }
        for method, (weight_N, theta) in models.items()
    ]
    values = problem.bds_values()
    for name, value in (("best of BDS", min(values.values())), ("best of BMO", problem.bmo_value())):
        rows.append({"part": "enumeration", "method": name, "validation_loss": value})
    start = np.array([0.4, 0.3, 0.2, 0.1])
    missing = 1 - refine(start, trusted=2, rho=RHO, num_steps=60)[2]
    return [*rows, {"part": "enumeration", "method": "BMO over responses, 1 - p(trusted)", "validation_loss": missing}]


def losses(problem: MarginProblem, theta: Array) -> dict[str, float]:
    return {
        "validation_loss": problem.validation_loss(theta),
        "useful_loss": float(problem.losses(theta)[:2].mean()),
        "population_loss": problem.population_loss(theta),
        "theta_0": float(theta[0]),
        "theta_1": float(theta[1]),
    }


def mixing(problem: MarginProblem) -> list[dict[str, Any]]:
    """The models of direct mixing."""
    grid = np.concatenate([np.linspace(0, 1, 41), [0.99, 0.999, 0.9999]])
    return [{"part": "mixing", "rho": r, **losses(problem, problem.solve(np.ones(4), r))} for r in np.sort(grid)]


def not_separable() -> list[dict[str, Any]]:
    """Validation losses where the rows cannot be fitted together."""
    theta_X, rows = np.linspace(-2, 2, 2001), []
    for problem, losses_of, validation in (
        ("two saturating losses", saturating_losses, 0.0),
        ("two targets (convex)", squared_losses, 0.4),
    ):
        loss_2X = losses_of(theta_X)
        for method, is_reached_X in (("BDS", minimise_a_sum(loss_2X)), ("BMO", weakly_pareto(loss_2X))):
            theta = min(theta_X[is_reached_X], key=lambda theta: abs(theta - validation))
            rows.append(_gap(problem, method, theta, validation))
    for selector, reference in (("softmax", "tracked"), ("softmax", "base"), ("softmax", "zero"), ("bmo", "zero")):
        settings = {"learning_rate": 0.02} if selector == "softmax" else {"temperature": 0.02, "score_map": "softmax"}
        row_weights = make_row_weights(selector, 2, **settings)
        theta = select_mean(np.array([0.0, 1.0]), 0.4, row_weights, RHO, 1000, reference)[1]
        rows.append(_gap(problem, f"{selector}, reference {reference}", theta, validation))
    return rows


def _gap(problem: str, method: str, theta: float, validation: float) -> dict[str, Any]:
    loss = float((theta - validation) ** 2 / 2)
    return {
        "part": "not_separable", "problem": problem, "method": method, "theta_0": float(theta), "validation_loss": loss
    }  # fmt: skip


def posterior(seeds: list[int]) -> list[dict[str, Any]]:
    """Calibrated probabilities beside the exact ones."""
    rows = []
    for name, pair in SCORE_PAIRS.items():
        for share in SHARES:
            for seed in seeds:
                score_R, is_right_R, score_V = pair.draw(share, NUM_TRAINING, NUM_VALIDATION, seed)
                calibration = fit(score_R, score_V)
                p_right_R, exact_R = calibration.p_right(score_R), pair.posterior(score_R, share)
                rows.append(
                    {
                        "part": "posterior",
                        "problem": name,
                        "seed": seed,
                        "share_right": share,
                        "estimated_share_right": calibration.share_right,
                        "is_believed": calibration.is_believed,
                        "posterior_error": float(np.abs(p_right_R - exact_R).mean()),
                        "brier": float(np.mean((p_right_R - is_right_R) ** 2)),
                        "brier_exact": float(np.mean((exact_R - is_right_R) ** 2)),
                    }
                )
    return rows


def posterior_of_rows() -> Array:
    """Exact probabilities of 1,000 rows, half of them right, their scores two deviations apart."""
    pair = SCORE_PAIRS["Gaussian, two deviations apart"]
    return pair.posterior(pair.draw(0.5, 1000, 1, 0)[0], 0.5)


def weight_rules(p_right_N: Array, noise: GradientNoise) -> dict[str, Array]:
    """Shares of the rows by each rule."""
    rules = {
        "all alike": np.ones_like(p_right_N),
        "p": p_right_N,
        "p^2": p_right_N**2,
        "cut at 1/2": (p_right_N >= 0.5).astype(float),
    }
    return {name: w / w.sum() for name, w in rules.items()} | {"best": noise.best_shares(p_right_N)}


def weights() -> list[dict[str, Any]]:
    """Errors of the gradient by rule and noise, over the best one's."""
    p_right_N, rows = posterior_of_rows(), []
    noises = [("agree", GradientNoise(variance, agreeing=1.0)) for variance in NOISES]
    noises += [("scatter", GradientNoise(variance, agreeing=0.0, scattered=1.0)) for variance in (0.1, 1.0)]
    for mistakes, noise in noises:
        shares = weight_rules(p_right_N, noise)
        best = noise.error(shares["best"], p_right_N)
        for rule, share_N in shares.items():
            error = noise.error(share_N, p_right_N) / best
            rows.append({"part": "weights", "problem": mistakes, "noise": noise.noise, "method": rule, "error": error})
    return rows


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_mixing(problem: MarginProblem, rows: list[dict[str, Any]], path: Path) -> None:
    """Parameter plane with the models of mixing and BDS; losses against rho."""
    plt = _pyplot()
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    bds = problem.solve(np.array([2.0, 2.0, 0.0, 0.0]), RHO)
    points = np.array([(row["theta_0"], row["theta_1"]) for row in rows])
    edge = np.linspace(-0.2, 3.2, 200)
    plane.fill_between([1, 3.2], 1, 3.2, color="tab:blue", alpha=0.15, label="fit the validation rows")
    both = np.minimum(2 * (edge - 1), 4 * (edge - 1))
    plane.fill_between(edge, -2.4, both, color="tab:green", alpha=0.15, label="fit both useful rows")
    for row, style in ((problem.training_ND[2], "--"), (problem.training_ND[3], ":")):
        plane.plot(edge, (1 - row[0] * edge) / row[1], style, color="tab:red", linewidth=1)
    plane.plot([], [], "--", color="tab:red", linewidth=1, label="below: fit a useless row")
    plane.plot(points[:, 0], points[:, 1], "-", color="black", label="direct mixing, rho 0 to 1")
    for place, name, offset in ((0, "plain SFT", -13), (-1, "validation rows\nalone", 6)):
        plane.plot(*points[place], "o", color="black")
        plane.annotate(name, points[place], (-8, offset), textcoords="offset points", ha="right", fontsize=9)
    plane.plot(*bds, "*", color="tab:green", markersize=15, label="BDS: useful rows only")
    plane.set(xlim=(-0.2, 3.2), ylim=(-2.4, 3.2), xlabel="first parameter", ylabel="second parameter")
    plane.set_title("No mixture fits the validation and the useful rows")
    plane.legend(fontsize=8, loc="upper left")
    zoom = curve.inset_axes((0.42, 0.3, 0.53, 0.42))
    for axes in (curve, zoom):
        for name, colour in (("population", "black"), ("validation", "tab:blue")):
            values = [row[f"{name}_loss"] for row in rows]
            axes.plot([row["rho"] for row in rows], values, color=colour, label=f"direct mixing, {name} loss")
        axes.axhline(0, color="tab:green", linewidth=2.5, label="BDS, both losses")
    zoom.set(xlim=(0.75, 1.0), ylim=(-0.004, 0.06))
    best = min(rows, key=lambda row: row["population_loss"])
    note, arrow = f"lowest: {best['population_loss']:.3f}", {"arrowstyle": "->"}
    zoom.annotate(note, (best["rho"], best["population_loss"]), (0.9, 0.052), arrowprops=arrow, fontsize=9)
    curve.indicate_inset_zoom(zoom, edgecolor="grey")
    curve.set(xlabel="rho (0: plain SFT, 1: validation rows alone)", ylabel="loss", xlim=(0, 1.01))
    curve.set_title("The population loss of BDS is below every rho")
    curve.legend(fontsize=9)
    _save(figure, path)


def draw_not_separable(path: Path) -> None:
    """Loss planes: what weights reach, what is weakly Pareto optimal, where the smoothed minimum leads."""
    plt = _pyplot()
    figure, (convex, concave) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    theta = np.linspace(0, 1, 401)
    convex.plot(
        theta**2 / 2, (theta - 1) ** 2 / 2, color="tab:green", linewidth=4, label="BDS and BMO: all of the curve"
    )
    ends = {"color": "tab:red", "label": "one row fitted: where bmo, zero and base pull"}
    convex.plot([0, 0.5], [0.5, 0], "s", markersize=9, **ends)
    convex.plot(0.4**2 / 2, 0.6**2 / 2, "*", color="black", markersize=14, label="best on validation")
    convex.set_title("Convex losses: weights reach every trade-off")
    theta = np.linspace(-1, 1, 2001)
    concave.plot(*saturating_losses(theta), color="tab:blue", linewidth=2, label="BMO: all of the curve")
    reached = theta[minimise_a_sum(saturating_losses(theta))]
    for part, label in ((reached[reached < 0], "BDS: what some weights reach"), (reached[reached > 0], None)):
        concave.plot(*saturating_losses(part), color="tab:green", linewidth=7, label=label, solid_capstyle="round")
    concave.plot(*saturating_losses(np.zeros(())), "*", color="black", markersize=14, label="best on validation")
    concave.set_title("Saturating losses: weights reach the ends only")
    for axes in (convex, concave):
        axes.set(xlabel="loss of row 1", ylabel="loss of row 2")
        axes.margins(0.08)
        axes.legend(fontsize=9)
    _save(figure, path)


def draw_posterior(path: Path) -> None:
    """Calibrated beside exact probabilities; the best weight as a function of the probability."""
    plt = _pyplot()
    figure, (calibrated, best) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    pair = SCORE_PAIRS["Gaussian, two deviations apart"]
    scores = np.linspace(-2, 4.5, 300)
    for share, colour in zip(SHARES, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(SHARES))), strict=True):
        score_R, _, score_V = pair.draw(share, NUM_TRAINING, NUM_VALIDATION, 0)
        calibrated.plot(scores, fit(score_R, score_V).p_right(scores), color=colour, label=f"{share:.0%} right")
        calibrated.plot(scores, pair.posterior(scores, share), "--", color=colour, linewidth=1)
    calibrated.set(xlabel="score of a row", ylabel="probability that it is right")
    calibrated.set_title("Calibrated (solid) and exact (dashed)")
    calibrated.legend(fontsize=9)
    p_right_N = np.sort(posterior_of_rows())
    for variance, colour in zip(NOISES, plt.get_cmap("plasma")(np.linspace(0, 0.8, len(NOISES))), strict=True):
        share_N = GradientNoise(variance, agreeing=1.0).best_shares(p_right_N)
        best.plot(p_right_N, share_N / share_N[-1], color=colour, label=f"noise / N = {variance / len(p_right_N):g}")
    best.plot(p_right_N, p_right_N**2, "--", color="black", label="p², the default")
    best.set(xlabel="probability p that a row is right", ylabel="best weight, over that of the surest row")
    best.set_title("The best weight rises with the probability")
    best.legend(fontsize=9)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    _pyplot().close(figure)


def main() -> None:
    parser = make_parser(__doc__, quick="one seed", seeds=(0, 1, 2, 3, 4))
    arguments = parser.parse_args()
    problem, seeds = separable_problem(), arguments.seeds[:1] if arguments.quick else arguments.seeds
    mixed, calibrated = mixing(problem), posterior(seeds)
    rows = [*solutions(problem), *mixed, *not_separable(), *calibrated, *weights()]
    draw_mixing(problem, mixed, arguments.output_dir / "theory_mixing.png")
    draw_not_separable(arguments.output_dir / "theory_not_separable.png")
    draw_posterior(arguments.output_dir / "theory_posterior.png")
    aggregates = {
        f"{name}_{problem}": [
            float(np.mean([abs(value(row)) for row in calibrated if (row["seed"], row["problem"]) == (seed, problem)]))
            for seed in seeds
        ]
        for problem in SCORE_PAIRS
        for name, value in (
            ("posterior_error", lambda row: row["posterior_error"]),
            ("share_error", lambda row: row["estimated_share_right"] - row["share_right"]),
        )
    }
    finish(arguments, rows, aggregates)


if __name__ == "__main__":
    main()
