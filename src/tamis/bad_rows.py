"""Rows that cannot be trained on: left out, counted and kept in a list where the user wants it, else an error."""

import logging
from collections.abc import Callable
from typing import Any

from tamis.rows import ContentCheck, check_weights

logger = logging.getLogger(__name__)


class BadRow(dict[str, Any]):
    """In the place of a row that could not be read: without values, so that the rows after it keep their numbers.

    Attributes:
        problem: the error, with the name of the row.
        text: what the file has there.
    """

    def __init__(self, problem: str, text: str):
        super().__init__()
        self.problem, self.text = problem, text


class RowSieve:
    """Finds the rows of one file that are left out.

    Args:
        name: of the file.
        place: what names a row, from its index.
        skipped: where they are put: `source`, `row`, `problem` and `content`. None: the first one is an error.
        weight_column: what the file calls the weights of its rows.
    """

    def __init__(
        self,
        name: str,
        place: Callable[[int], str],
        skipped: list[dict[str, Any]] | None,
        weight_column: str | None = None,
    ):
        self.name, self.place, self.skipped, self.weight_column = name, place, skipped, weight_column
        self._found: dict[int, str] = {}

    def good_places(
        self,
        batch: Any,
        columns: dict[str, list[Any]],
        weights: list[Any] | None,
        names: dict[str, str],
        check: ContentCheck,
    ) -> list[int]:
        """The places of the rows in the batch that are kept.

        Args:
            batch: the rows as they were read.
            columns, names: of these, see `ContentCheck.add`.
            weights: of these, where they have some.
            check: of all rows of the file so far.

        Raises:
            ValueError: a row could not be read, and none may be left out.
        """
        first, bad = check.num_rows, dict[int, str]()
        for i, row in enumerate(batch if isinstance(batch, list) else ()):
            if isinstance(row, BadRow):
                if self.skipped is None:
                    raise ValueError(row.problem)
                bad[first + i] = row.problem
        check.add(columns, names)
        num_rows = check.num_rows - first
        if self.skipped is None:
            return list(range(num_rows))
        for i, problem in check.take_bad().items():
            bad.setdefault(i, problem)
        for i, weight in enumerate(weights or ()):
            try:
                check_weights([weight], str(self.weight_column), lambda _, i=i: self.place(first + i))  # type: ignore[misc]
            except ValueError as error:
                bad.setdefault(first + i, str(error))
        for i, problem in sorted(bad.items()):
            row = batch[i - first] if isinstance(batch, list) else None
            content = (
                row.text if isinstance(row, BadRow) else {name: columns[k][i - first] for k, name in names.items()}
            )
            self.skipped.append({"source": self.name, "row": i, "problem": problem, "content": content})
        self._found |= bad
        return [i for i in range(num_rows) if first + i not in bad]

    def report(self, num_rows: int) -> None:
        """Say how many rows of the file were left out.

        Raises:
            ValueError: those are all.
        """
        if not self._found:
            return
        first = f"first {self._found[min(self._found)]}"
        if len(self._found) == num_rows:
            raise ValueError(f"{self.name}: all {num_rows} rows are bad, {first}")
        logger.warning(f"{self.name}: {len(self._found)} of {num_rows} rows skipped, {first}")
