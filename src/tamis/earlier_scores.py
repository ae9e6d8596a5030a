"""Probabilities of an earlier `tamis score` or run for the same rows: what `scores` takes over in place of scouting."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tamis.weights_file import require_columns, weight_batches, weights_path

logger = logging.getLogger(__name__)

SCOUT_REPORT = "scout.json"
_COLUMNS = ["content_hash", "p_right", "score"]


@dataclass(frozen=True)
class EarlierScores:
    """What an earlier run knows of the rows.

    Attributes:
        path: of its `weights.parquet`.
        score_N: log-odds that each row is right, NaN where they are not known. Probabilities would be rounded at one.
    """

    path: Path
    score_N: NDArray[np.float32]

    @property
    def fingerprint(self) -> str:
        """Of the scores."""
        return hashlib.blake2b(self.score_N.tobytes(), digest_size=8).hexdigest()

    def of(self, example_ids: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Scores of the R rows that are trained on; None, with a warning, where those of none of them are known.

        A row that was left out when the others were scored, because its prompt did not fit that model, is taken to be
        as likely right as the others are on average; a warning says how many there are.
        """
        score_R = self.score_N[example_ids]
        is_unknown_R = np.isnan(score_R)
        if is_unknown_R.all():
            logger.warning(
                f"the scout of {self.path.parent} was not believed: all weights are one. Its `scout.json` and its "
                "warnings say more"
            )
            return None
        if is_unknown_R.any():
            mean = _p_right(score_R[~is_unknown_R]).mean()
            score_R[is_unknown_R] = np.log(mean / (1 - mean))
            logger.warning(
                f"{self.path} has no probability for {is_unknown_R.sum()} rows, whose prompts were too long there: "
                "they are taken to be as likely right as the others are on average"
            )
        num_useful = np.square(_p_right(score_R)).sum()
        logger.info(f"weights by {self.path}: {len(score_R)} rows are worth {num_useful:.0f} surely right ones")
        return score_R


def read_scores(
    given: str, output_dir: str | Path, hash_N: pa.ChunkedArray, name_of: Callable[[int], str]
) -> EarlierScores:
    """The scores of an earlier run.

    Args:
        given: its directory or the `weights.parquet` in it, as the setting `scores` has it.
        output_dir: of this run.
        hash_N: of what each row to be trained on says, as `tamis.rows.row_table` has it. The same rows as were
            scored, in the same order; the names of their files may differ.
        name_of: of a row, by its place.

    Raises:
        ValueError: they are not, the file cannot be read, no scout has scored the rows, or this run would replace it.
    """
    path, remedy = weights_path(given, "scores"), "Give the rows that were scored, in the same order, or score these"
    if path.parent.resolve() == Path(output_dir).resolve():
        raise ValueError("`scores` are in `output_dir`, which the run would replace: choose another `output_dir`")
    score_N, first = np.full(len(hash_N), np.nan, np.float32), 0
    try:
        require_columns(path, _COLUMNS)
        num_scored = pq.read_metadata(path).num_rows
        if num_scored != len(hash_N):
            raise ValueError(f"{path} has {num_scored} rows, and train_dataset has {len(hash_N)}. {remedy}")
        for batch in weight_batches(path, _COLUMNS):
            scored = pa.chunked_array([batch["content_hash"].cast(pa.string())])
            is_other = ~pc.equal(hash_N.slice(first, len(batch)), scored).to_numpy()
            if is_other.any():
                name = name_of(first + int(is_other.argmax()))
                raise ValueError(f"{name} is not what {path} has in its place. {remedy}")
            is_known = batch["p_right"].is_valid().to_numpy(zero_copy_only=False)
            score_N[first : first + len(batch)][is_known] = batch["score"].to_numpy(zero_copy_only=False)[is_known]
            first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}). Check that it is whole") from error
    if not (path.parent / SCOUT_REPORT).is_file():
        raise ValueError(f"{path.parent} has no {SCOUT_REPORT}: no scout has scored its rows. Give a `tamis score`")
    return EarlierScores(path, score_N)


def _p_right(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-scores.astype(np.float64)))
