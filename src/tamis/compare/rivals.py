"""Other ways of selecting training rows, each with its paper: scored once, kept or weighed, then trained on.

What is ours in each is in the docstring of its score. As for SEAL (`tamis.compare.seal`), the kept rows are trained on
alone, which is what the papers do, and mixed with the trusted rows. The share of the rows that are kept is the
caller's: the best of several is shown.

BDS is no score but a rule along the steps: softmax weights of the rows, learned by the loss itself at constant rho
(Xiao and Chen, arXiv 2511.21056). It takes the published update, that of SEAL (Adam on all logits), over a grid of rho
and with either map of SEAL.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from trl import ModelConfig

from tamis.compare.cost import counted
from tamis.compare.runs import (
    Method,
    Share,
    file_digest,
    keep_top,
    run_alone_and_mixed,
    run_method,
    share_name,
    share_value,
)
from tamis.compare.scores_gradient import gradient_cosine, less
from tamis.compare.scores_loss import color_filter, in_context, perplexity_filter, rho_loss_offline
from tamis.compare.scores_text import dsir, nearest_neighbours, random_order
from tamis.compare.task import Task, is_right, run_dir, slug
from tamis.config import BilevelConfig
from tamis.files import write_atomically
from tamis.metrics import auroc
from tamis.run import DataArguments, make_trainer
from tamis.trainer import BilevelTrainer

logger = logging.getLogger(__name__)

BDS, BDS_RHOS = "BDS, constant rho", (0.1, 0.3, 0.8)


@dataclass(frozen=True)
class Rival:
    """A way of scoring training rows.

    Attributes:
        paper: arXiv number; empty where the score is nobody's in particular.
        score: of each prepared training row, by a trainer that has not trained; higher is better.
        weighs: the paper weighs all rows by their scores, scaled to between 0 and 1, instead of keeping the best.
    """

    paper: str
    score: Callable[[BilevelTrainer], Tensor]
    weighs: bool = False


RIVALS = {
    "random": Rival("", random_order),
    "DSIR": Rival("2302.03169", dsir),
    "nearest neighbours": Rival("", nearest_neighbours),
    "perplexity filter": Rival("1911.00359", perplexity_filter),
    "ICA": Rival("2510.14459", in_context, weighs=True),
    "gradient cosine": Rival("", gradient_cosine),
    "LESS": Rival("2402.04333", less),
    "CoLoR-Filter": Rival("2406.10670", color_filter),
    "RHO-loss, offline": Rival("2206.07137", rho_loss_offline),
}
ALL_RIVALS = (*RIVALS, BDS)


@dataclass(frozen=True)
class Scores:
    """What a rival thinks of the training rows.

    Attributes:
        score_N: higher is better; minus infinity for rows that are too long to be trained on.
        seconds: that scoring took, without loading the model.
        cost_forwards: forward-equivalents per training row, see `tamis.compare.cost`.
        auroc: of the scores against the labels; None where all rows are of one kind.
    """

    score_N: NDArray[np.float64]
    seconds: float
    cost_forwards: float
    auroc: float | None


class Scorer:
    """Scores training rows by rivals. Scores that are there already are read.

    The base model is loaded once, and only where there is something to score.

    Args:
        make_trainer: makes one that never trains on the rows: it has the base model and the prepared rows.
        output_dir: as for `run_method`; the scores are in `runs/NAME_scores/`.
        identity: what the scores depend on: rows, model and settings, the seed, the learning rate and the batch sizes
            among them.
        labels: whether each training row is right, where that is known.
    """

    def __init__(
        self,
        make_trainer: Callable[[], BilevelTrainer],
        output_dir: Path,
        identity: dict[str, Any],
        labels: Callable[[], NDArray[np.bool_]] | None = None,
    ):
        self._make_trainer, self.output_dir, self._identity, self._labels = make_trainer, output_dir, identity, labels

    @cached_property
    def trainer(self) -> BilevelTrainer:
        """What the scores are made with."""
        return self._make_trainer()

    def folder(self, name: str) -> Path:
        """Where the files of a rival are."""
        return run_dir(self.output_dir, f"{name}, scores")

    def scores(self, name: str) -> Scores:
        """What a rival of `RIVALS` thinks of the rows."""
        path, identity = self.folder(name) / "scores.json", {"rival": name} | self._identity
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("identity") == identity:
                score_N = [-np.inf if score is None else score for score in found.pop("score_N")]
                return Scores(np.array(score_N), **found)
        scores = self._score(name)
        values = [float(score) if np.isfinite(score) else None for score in scores.score_N]
        text = json.dumps(vars(scores) | {"identity": identity, "score_N": values})
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return scores

    def _score(self, name: str) -> Scores:
        trainer = self.trainer
        logger.info(f"--- {name}: scores")
        started = time.perf_counter()
        with counted(trainer) as cost:
            score_R = RIVALS[name].score(trainer)
        seconds = time.perf_counter() - started
        score_N = np.full(len(trainer.weighting.train_rows), -np.inf)
        score_N[trainer.batches.training.ids.numpy()] = score_R.double().numpy()
        return Scores(score_N, seconds, cost.forwards, auroc(score_N, self._labels()) if self._labels else None)


def scorer_of(task: Task, output_dir: Path, common: dict[str, Any]) -> Scorer:
    """Scores the training rows of a task.

    Args:
        common: settings of `tamis train`.
    """

    def make() -> BilevelTrainer:
        settings = common | {"selector": "none", "eval_strategy": "no"}
        args = BilevelConfig(output_dir=str(run_dir(output_dir, "scoring")), **settings)
        data = DataArguments([str(task.train_file)], str(task.validation_file))
        return make_trainer(data, args, ModelConfig(model_name_or_path=str(task.model_dir)))

    identity = {"task": task.fingerprint, "settings": common}
    identity |= {"rows": file_digest(task.train_file), "validation": file_digest(task.validation_file)}
    return Scorer(make, output_dir, identity, lambda: is_right(task))


def run_rivals(
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    shares: Sequence[Share],
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of rivals, as `run_method` makes them. The variants of a rival are a group.

    ``selection_auroc`` and ``cost_forwards`` are those of the scores, ``seconds`` counts scoring and training.

    Args:
        shares: of the training rows that are kept; `tamis.compare.runs.TAMIS_SHARE` is what tamis takes for right.
        names: of `ALL_RIVALS`; all of them when None.

    Raises:
        ValueError: there is no rival of that name, or see `share_value`.
    """
    names = ALL_RIVALS if names is None else names
    if unknown := [name for name in names if name not in ALL_RIVALS]:
        raise ValueError(f"unknown rival {unknown[0]!r}: choose from {', '.join(ALL_RIVALS)}")
    scorer, rows = scorer_of(task, output_dir, common), list[dict[str, Any]]()
    for name in names:
        if name == BDS:
            rows += [run_method(method, task, output_dir, common) for method in _bds_methods(task)]
        else:
            rows += _run_rival(name, scorer, task, common, shares)
    return rows


def _run_rival(
    name: str, scorer: Scorer, task: Task, common: dict[str, Any], shares: Sequence[Share]
) -> list[dict[str, Any]]:
    output_dir = scorer.output_dir
    scores, folder = scorer.scores(name), scorer.folder(name)
    rows = []
    for share in shares:
        path = folder / f"{slug(share_name(share))}.jsonl"
        kept = keep_top(task, scores.score_N, share_value(share, output_dir), path)
        rows += run_alone_and_mixed(f"{name}, {share_name(share)}", kept, task, output_dir, common, name)
    if RIVALS[name].weighs:
        weighed = _write_weights(task, scores.score_N, folder / "weights.jsonl")
        by_weight = {"selector": "column"}
        rows += run_alone_and_mixed(f"{name}, as weights", weighed, task, output_dir, common, name, by_weight)
    found = {"selection_auroc": scores.auroc, "cost_forwards": scores.cost_forwards}
    return [row | found | {"seconds": scores.seconds + row["seconds"]} for row in rows]


def _write_weights(task: Task, score_N: NDArray[np.float64], path: Path) -> Path:
    """The training rows with a column ``weight``: their scores, scaled to between 0 and 1."""
    weight_N = scaled(score_N)
    rows = [json.loads(line) for line in task.train_file.read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(row | {"weight": float(w)}) + "\n" for row, w in zip(rows, weight_N, strict=True))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def scaled(score_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores as weights between 0 and 1; rows without a score have 0."""
    is_finite_N = np.isfinite(score_N)
    low, high = score_N[is_finite_N].min(), score_N[is_finite_N].max()
    return np.where(is_finite_N, (score_N - low) / max(high - low, 1e-12), 0.0)


def bds_variants() -> dict[str, dict[str, Any]]:
    """Settings of `tamis train` by the names of the variants of BDS."""
    return {
        f"BDS, rho={rho}{'' if selector == 'softmax' else f', {selector}'}": {
            "selector": selector,
            "reference": "zero",
            "rho": rho,
        }
        for selector in ("softmax", "sigmoid")
        for rho in BDS_RHOS
    }


def _bds_methods(task: Task) -> list[Method]:
    return [Method(name, task.train_file, settings, BDS) for name, settings in bds_variants().items()]
