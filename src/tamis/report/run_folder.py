"""What a run directory holds, as far as it goes: a run may be going on, killed, or one that trained nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tamis.curation.weighed import config_of, read_weights
from tamis.output_dir import finished_step, read_metrics

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RunFolder:
    """What is known of a run.

    Attributes:
        path: of the run directory.
        config: its settings, and `run_info`.
        metrics: one record for each log step.
        weights: see `tamis.curation.weighed.read_weights`; None before there are any.
        scout: `scout.json`, of the run or of the scoring that it was given; None where nothing was scouted.
        scores: `scout_scores.parquet`, likewise; None where nothing was scouted, or an earlier version of tamis has.
        is_finished: whether the run has made all of its steps.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    weights: pa.Table | None
    scout: dict[str, Any] | None
    scores: pa.Table | None
    is_finished: bool

    @property
    def selector(self) -> str:
        """What has weighed the rows."""
        return str(self.config.get("selector", "scout"))

    @property
    def is_believed(self) -> bool:
        """Whether a scout has weighed the rows."""
        return bool(self.scout and self.scout["is_believed"])

    @property
    def num_steps(self) -> int:
        """Steps of training so far."""
        return max((int(record["step"]) for record in self.metrics), default=0)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged."""
        found = [(int(r["step"]), float(r[name])) for r in self.metrics if r.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def column(self, name: str) -> Values:
        """A column of the weights."""
        assert self.weights is not None
        values: Values = self.weights[name].to_numpy()
        return values

    def training_scores(self) -> Values | None:
        """The score of each row, nats per token, NaN where it has none; None where they are not known."""
        if self.scores is None or self.weights is None:
            return None
        place_S = self.scores["example_id"].to_numpy()
        is_training_S = ~np.isnan(place_S)
        score_N = np.full(len(self.weights), np.nan)
        score_N[place_S[is_training_S].astype(int)] = self.scores["score"].to_numpy()[is_training_S]
        return score_N

    def validation_scores(self) -> tuple[Values, Values] | None:
        """Scores of unseen validation rows, and what each counts."""
        if self.scores is None:
            return None
        is_validation_S = self.scores["example_id"].is_null().to_numpy()
        scores = self.scores.filter(pa.array(is_validation_S))
        return scores["score"].to_numpy(), scores["weight"].to_numpy()


def read_run(given: str) -> RunFolder:
    """Read a run directory.

    Raises:
        ValueError: it is none, or what is in it cannot be read.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder. Give a run directory, the output_dir of tamis train or tamis score")
    config = config_of(path)
    weights_file = path / "weights.parquet"
    if not config.get("run_info") and not weights_file.is_file():
        raise ValueError(f"{path} is no run directory: it has neither a config.yaml of tamis nor a weights.parquet")
    scout_file, scores_file = path / "scout.json", path / "scout_scores.parquet"
    return RunFolder(
        path=path,
        config=config,
        metrics=read_metrics(path),
        weights=read_weights(weights_file) if weights_file.is_file() else None,
        scout=json.loads(scout_file.read_text(encoding="utf-8")) if scout_file.is_file() else None,
        scores=pq.read_table(scores_file) if scores_file.is_file() else None,
        is_finished=finished_step(str(path)) is not None,
    )
