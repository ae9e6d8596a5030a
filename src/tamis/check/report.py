"""What `tamis check` has found: the one object that is shown to people and written for machines."""

from dataclasses import dataclass, field
from typing import Any

from tamis.check.bad_files import MAX_SHOWN, by_file
from tamis.check.cost import Cost
from tamis.check.overlap import MAX_SEARCHED, SHINGLE_SIZE, THRESHOLD
from tamis.inference import ShownRow


@dataclass(frozen=True)
class Overlap:
    """Rows of a data set that another one has too.

    Attributes:
        rows, prompts: see `tamis.check.overlap.Shared`.
        near_duplicates: distinct rows that are nearly rows of the other one.
    """

    rows: int
    prompts: int | None
    near_duplicates: int


@dataclass(frozen=True)
class DataSet:
    """Figures of one data set; None where they are not known without a tokenizer, or have no meaning.

    Attributes:
        rows: without bad ones.
        bad_rows: those that were left out.
        tokens, median_length, longest: of rows before they are cut.
        truncated, dropped: rows that are cut to ``max_length``, and those whose prompt alone is longer.
        repeated_rows: rows that say what another row says, beyond the first.
        other_answers: further responses to the same prompts.
        near_duplicates, searched: see `tamis.check.overlap.Near`.
        shared: with other data sets, by their role.
    """

    rows: int
    bad_rows: int
    tokens: int | None
    median_length: float | None
    longest: int | None
    truncated: int | None
    dropped: int | None
    repeated_rows: int
    other_answers: int | None
    near_duplicates: int
    searched: int
    shared: dict[str, Overlap]


@dataclass
class Report:
    """Everything that is said.

    Attributes:
        errors: why training could not work, in the words of `tamis train`.
        warnings: what it would warn of, and more.
        notes: what it would say of the files.
        bad_rows: rows that cannot be trained on.
        data_sets: by role.
        example: the first training row as the model sees it.
        settings: what was resolved, each with its reason.
        cost: time, memory and disk.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    data_sets: dict[str, DataSet] = field(default_factory=dict)
    example: ShownRow | None = None
    settings: list[str] = field(default_factory=list)
    cost: Cost | None = None

    @property
    def exit_code(self) -> int:
        """2 where training could not work, else 0."""
        return 2 if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the bad rows of a file the first ten, and how many there are."""
        files = by_file(self.bad_rows)
        return {
            "can_train": not self.errors,
            "errors": self.errors,
            "warnings": self.warnings,
            "notes": self.notes,
            "num_bad_rows": {name: len(rows) for name, rows in files.items()},
            "bad_rows": [
                {"source": row["source"], "row": row["row"], "problem": row["problem"]}
                for rows in files.values()
                for row in rows[:MAX_SHOWN]
            ],
            "data_sets": {
                role: vars(found) | {"shared": {other: vars(one) for other, one in found.shared.items()}}
                for role, found in self.data_sets.items()
            },
            "near_duplicates": {
                "threshold": THRESHOLD,
                "shingle_size": SHINGLE_SIZE,
                "max_searched_rows": MAX_SEARCHED,
            },
            "example": None if self.example is None else vars(self.example),
            "settings": self.settings,
            "cost": None if self.cost is None else self.cost.to_dict(),
        }
