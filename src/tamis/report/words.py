"""What a run has found, what to do about it, and what to beware of, in sentences."""

from dataclasses import dataclass

import numpy as np

from tamis.report.run_folder import RunFolder
from tamis.selection.calibration import FEW_RIGHT
from tamis.summary import select_command, train_command

_FEW_VALIDATION_ROWS = 30
_FEW_EFFECTIVE = 0.05


@dataclass(frozen=True)
class Findings:
    """The head of the page.

    Attributes:
        learned: one or two sentences.
        next_steps: commands, each with what it is good for.
        warnings: sentences.
    """

    learned: list[str]
    next_steps: list[tuple[str, str]]
    warnings: list[str]


def findings(run: RunFolder) -> Findings:
    """The head of the page of a run."""
    return Findings(_learned(run), _next_steps(run), _warnings(run))


def _learned(run: RunFolder) -> list[str]:
    if run.weights is None:
        return ["The run has not weighed its rows yet."]
    num_rows = len(run.weights)
    if run.is_believed:
        assert run.scout is not None
        wrong = 1 - run.scout["share_right"]
        first = f"About {wrong:.0%} of {num_rows:,} rows look wrong."
        if run.scout["expected_auroc"] is None:
            return [first]
        times = round(100 * run.scout["expected_auroc"])
        often = f"{times} times in 100" if times < 100 else "nearly always"
        return [first, f"Of a right and a wrong row, the right one should have the higher weight {often}."]
    if run.scout:
        return [
            f"The {num_rows:,} training rows cannot be told from trusted rows that the scout has not seen.",
            "So nothing was decided: all rows have the same weight.",
        ]
    if run.selector == "none":
        return [f"All {num_rows:,} rows have the same weight: selector none weighs nothing."]
    if run.selector == "column":
        return [f"The weights of the {num_rows:,} rows are those that were given in a column."]
    return [
        f"Selector {run.selector} has weighed {num_rows:,} rows while it trained.",
        "It does not estimate how many of them are wrong.",
    ]


def _next_steps(run: RunFolder) -> list[tuple[str, str]]:
    config = f"tamis train --config {run.path}/config.yaml"
    if run.weights is None or not run.is_finished:
        return [(f"{config} --resume_from_checkpoint last", "goes on with the run, if it has stopped")]
    select = select_command(run.path)
    steps = [(select, "writes the rows that are kept, in the format of your files")]
    if not run.is_believed:
        if run.config.get("scores"):
            return [("tamis score", "scores the rows anew, with more or other trusted rows or a larger model")]
        return [(f"{config} --output_dir {run.path}-again", "trains again, after more or other trusted rows")]
    steps.append((f"{select} --overrides marks.jsonl", "the same, with the marks that you set on this page"))
    if run.num_steps == 0:
        steps.append((train_command(run.path), "trains with these weights"))
    return steps


def _warnings(run: RunFolder) -> list[str]:
    found = list[str]()
    if not run.is_finished:
        found.append(f"The run has not ended: what is shown is its state after step {run.num_steps}.")
    if run.scout and not run.is_believed:
        found.append(
            "Try more trusted rows (--validation_dataset), trusted rows that are more like the right training rows, or "
            "a larger model (--model_name_or_path)."
        )
    if run.is_believed and run.scout and run.scout["share_right"] < FEW_RIGHT:
        found.append(
            "Very few rows look right. Check that the trusted rows (--validation_dataset) are of the same kind as the "
            "training rows, and as hard."
        )
    num_validation = _num_validation(run)
    if num_validation and num_validation < _FEW_VALIDATION_ROWS:
        found.append(
            f"There are only {num_validation} trusted rows: the estimates are rough. Add some to --validation_dataset."
        )
    if run.scout and run.scores is None:
        found.append("The run is of an earlier version of tamis and has not kept the scores behind its weights.")
    if run.weights is not None:
        weight = run.column("weight").astype(float)
        effective = weight.sum() ** 2 / max((weight**2).sum(), 1e-12)
        if effective < _FEW_EFFECTIVE * len(weight):
            found.append(
                f"The weight lies on few rows: they count as {effective:.0f} of {len(weight):,}. Fewer epochs "
                "(--num_train_epochs) keep the model from learning these by heart."
            )
    return found


def _num_validation(run: RunFolder) -> int | None:
    """How many validation rows stand behind the scores: their weights sum to that."""
    found = run.validation_scores()
    return None if found is None else round(float(np.sum(found[1])))
