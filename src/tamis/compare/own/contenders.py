"""The methods of `tamis compare`: the rows that each trains on, and the settings of `tamis train` that make it.

A name on the command line may stand for several contenders, such as mixing at three values of rho. They are one group,
and the best of them stands for it: chosen by the held-out rows, which favours the rivals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from tamis.compare.rivals import BDS, RIVALS, Scores, bds_variants, scaled
from tamis.compare.runs import STATIC, TAMIS, TAMIS_SHARE, share_value, top_rows
from tamis.compare.seal import ONE_STAGE, PUBLISHED_SHARE, SEAL, SealTrainer
from tamis.compare.table import MIXING, TRUSTED_ALONE
from tamis.trainer import BilevelTrainer

BASE, PLAIN, REFINING, SELECT = "base model", "plain SFT", "tamis, refining", "select, then SFT"
ALONE: dict[str, Any] = STATIC | {"rho": 0.0}


@dataclass(frozen=True)
class Rows:
    """What a run trains on.

    Attributes:
        ids_K: places of the training rows.
        with_trusted: the trusted rows are trained on as if they were training rows.
        weight_K: of the training rows, for the selector `column`.
    """

    ids_K: NDArray[np.int64]
    with_trusted: bool = False
    weight_K: NDArray[np.float64] | None = None

    def of(self, train: Dataset, validation: Dataset) -> Dataset:
        """The rows themselves.

        Raises:
            ValueError: training and trusted rows are to be one data set, and have no common layout.
        """
        rows = train.select(self.ids_K)
        if self.weight_K is not None:
            rows = rows.add_column("weight", self.weight_K.tolist())
        if not self.with_trusted:
            return rows
        if not len(rows):
            return validation
        if (set(rows.column_names) ^ set(validation.column_names)) & {"prompt", "completion", "messages", "text"}:
            raise ValueError("training and trusted rows differ in layout and cannot be one file: give them the same")
        return concatenate_datasets([rows, validation])

    def digest(self) -> str:
        """Changes when the rows do."""
        content = self.ids_K.tobytes() + bytes([self.with_trusted])
        return sha256(content + (b"" if self.weight_K is None else self.weight_K.tobytes())).hexdigest()


class Seed(Protocol):
    """What a contender may ask for: the data sets, and what others have made with the same seed."""

    train: Dataset
    output_dir: Path
    keep_share: float | None

    def scores(self, rival: str) -> Scores:
        """What a rival thinks of the training rows."""
        ...

    def run_dir(self, name: str) -> Path:
        """Where the run of a contender is, which came before."""
        ...


@dataclass(frozen=True)
class Contender:
    """One run of each seed.

    Attributes:
        rows: the training rows.
        settings: of `tamis train`; all others are shared.
        sees_validation: whether the run is given the trusted rows beside the training rows.
        takes: which settings of the user are its own: ``selection``, ``refining``.
        trainer: where settings do not suffice.
    """

    name: str
    group: str
    rows: Callable[[Seed], Rows]
    settings: dict[str, Any]
    sees_validation: bool = True
    takes: tuple[str, ...] = ()
    trainer: type[BilevelTrainer] = BilevelTrainer


@dataclass(frozen=True)
class Kind:
    """What a name of `methods` stands for.

    Attributes:
        contenders: given the values of rho of mixing.
        keeps: whether it keeps a part of the rows that `keep_share` tells.
        needs_tamis: whether it reads the run of tamis in any case.
    """

    contenders: Callable[[Sequence[float]], list[Contender]]
    keeps: bool = False
    needs_tamis: bool = False

    def asks_tamis(self, keep_share: float | None) -> bool:
        """Whether tamis has to run before it."""
        return self.needs_tamis or (self.keeps and keep_share is None)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _all(seed: Seed) -> Rows:
    return Rows(np.arange(len(seed.train)))


def _trusted(seed: Seed) -> Rows:
    return Rows(np.arange(0), with_trusted=True)


def _selected(seed: Seed) -> Rows:
    """The rows that tamis keeps, and the trusted rows: what a user trains on who takes the clean file elsewhere."""
    kept = pq.read_table(seed.run_dir(TAMIS) / "weights.parquet", columns=["kept"])["kept"].to_numpy()
    return Rows(np.flatnonzero(kept), with_trusted=True)


def _top(rival: str, seed: Seed) -> Rows:
    share = share_value(TAMIS_SHARE, seed.output_dir) if seed.keep_share is None else seed.keep_share
    return Rows(np.array(top_rows(seed.scores(rival).score_N, share)))


def _weighed(rival: str, seed: Seed) -> Rows:
    return Rows(np.arange(len(seed.train)), weight_K=scaled(seed.scores(rival).score_N))


def _top_of_seal(seed: Seed) -> Rows:
    weights = pq.read_table(seed.run_dir(SEAL) / "weights.parquet", columns=["weight"])["weight"].to_numpy()
    return Rows(np.array(top_rows(weights, PUBLISHED_SHARE)))


# --- the methods ------------------------------------------------------------------------------------------------------


def _alone_and_mixed(
    name: str, group: str, rows: Callable[[Seed], Rows], settings: dict[str, Any] = STATIC
) -> list[Contender]:
    """On the rows alone, as is published, and mixed with the trusted rows at the default rho; see `rivals`."""
    alone = Contender(name, group, rows, settings | {"rho": 0.0}, sees_validation=False)
    return [alone, Contender(f"{name}, mixed", group, rows, settings)]


def _rival(name: str, rhos: Sequence[float]) -> list[Contender]:
    found = _alone_and_mixed(f"{name}, kept", name, partial(_top, name))
    if RIVALS[name].weighs:
        found += _alone_and_mixed(f"{name}, as weights", name, partial(_weighed, name), {"selector": "column"})
    return found


def _seal(rhos: Sequence[float]) -> list[Contender]:
    stage_one = Contender(SEAL, SEAL, _all, ONE_STAGE, trainer=SealTrainer)
    name = f"SEAL, top {PUBLISHED_SHARE:.0%}"
    return [stage_one, *_alone_and_mixed(name, name, _top_of_seal)]


def _mixing(rhos: Sequence[float]) -> list[Contender]:
    return [Contender(f"mixing rho={rho:g}", MIXING, _all, STATIC | {"rho": rho}) for rho in rhos]


def _bds(rhos: Sequence[float]) -> list[Contender]:
    return [Contender(name, BDS, _all, settings) for name, settings in bds_variants().items()]


def _single(contender: Contender, rhos: Sequence[float]) -> list[Contender]:
    return [contender]


_PLAIN = Contender(PLAIN, PLAIN, _all, ALONE, sees_validation=False)
_TRUSTED = Contender(TRUSTED_ALONE, TRUSTED_ALONE, _trusted, ALONE, sees_validation=False)
_TAMIS = Contender(TAMIS, TAMIS, _all, {}, takes=("selection",))
_REFINING = Contender(REFINING, REFINING, _all, {"refine_fraction": "auto"}, takes=("selection", "refining"))
_SELECT = Contender(SELECT, SELECT, _selected, ALONE, sees_validation=False)

# In the order in which they run: tamis first among those that others ask.
METHODS: dict[str, Kind] = {
    "plain_sft": Kind(partial(_single, _PLAIN)),
    "trusted_alone": Kind(partial(_single, _TRUSTED)),
    "mixing": Kind(_mixing),
    "tamis": Kind(partial(_single, _TAMIS)),
    "tamis_refining": Kind(partial(_single, _REFINING)),
    "select_then_sft": Kind(partial(_single, _SELECT), needs_tamis=True),
    "random": Kind(partial(_rival, "random"), keeps=True),
    "seal": Kind(_seal),
    "bds": Kind(_bds),
} | {
    name.lower().replace(", ", "_").replace(" ", "_").replace("-", "_"): Kind(partial(_rival, name), keeps=True)
    for name in RIVALS
    if name != "random"
}
DEFAULT_METHODS = ("plain_sft", "trusted_alone", "mixing", "tamis", "select_then_sft", "random")


def contenders(methods: Sequence[str], rhos: Sequence[float]) -> list[Contender]:
    """All runs of a seed, in an order in which each finds what it asks for."""
    return [contender for name, kind in METHODS.items() if name in methods for contender in kind.contenders(rhos)]
