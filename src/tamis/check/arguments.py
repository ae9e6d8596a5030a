"""The options of `tamis check` beside those of `tamis train`."""

from dataclasses import dataclass, field


@dataclass
class CheckArguments:
    """What is checked, and for whom.

    Attributes:
        measure: train a few steps, to know the time and the memory that the run needs.
        json: write one JSON object instead of tables.
    """

    measure: bool = field(
        default=True,
        metadata={"help": "Train a few steps, to know time and memory. Without it the model is not even loaded."},
    )
    json: bool = field(default=False, metadata={"help": "Write one JSON object to stdout, and nothing else."})
