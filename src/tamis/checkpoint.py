"""What a checkpoint of tamis holds besides that of `transformers`: one safetensors file with all state of our own.

Parts (selector, reference, refiner) are saved by their `state_dict`, each under its name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tamis.recorder import write_atomically

STATE_FILE = "tamis.safetensors"


class Stateful(Protocol):
    """Something whose state is a flat dictionary of tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


def save_state(checkpoint: str | Path, parts: Mapping[str, Stateful], num_tokens: int, fingerprint: str) -> None:
    """Write the state of all parts.

    Args:
        num_tokens: trained on so far.
        fingerprint: of the training rows, so that the state is never applied to others.
    """
    state = {
        f"{part}.{name}": t.contiguous() for part, owner in parts.items() for name, t in owner.state_dict().items()
    }
    state["num_tokens"] = torch.tensor(num_tokens)
    metadata = {"train_dataset": fingerprint}
    write_atomically(Path(checkpoint) / STATE_FILE, lambda path: save_file(state, path, metadata))


def load_state(checkpoint: str | Path, parts: Mapping[str, Stateful]) -> int:
    """Give all parts their state; returns the number of tokens trained on.

    Raises:
        ValueError: the checkpoint has other parts: its run had other settings.
    """
    state = load_file(Path(checkpoint) / STATE_FILE)
    saved = {name.split(".")[0] for name in state if "." in name}
    if mismatch := saved ^ {part for part, owner in parts.items() if owner.state_dict()}:
        raise ValueError(
            f"{checkpoint} was written with other settings ({', '.join(sorted(mismatch))} in one and not the other): "
            "resume with the settings the run was started with"
        )
    for part, owner in parts.items():
        own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
        try:
            owner.load_state_dict(own)
        except KeyError as error:
            raise ValueError(
                f"{checkpoint} was written with other settings (no {error} of the {part}): resume with the settings "
                "the run was started with"
            ) from error
    return int(state["num_tokens"])


def refuse_foreign(checkpoint: str | Path, fingerprint: str) -> None:
    """Check that a checkpoint was written by tamis on these training rows.

    Raises:
        ValueError: it was not.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {STATE_FILE}: it was not written by tamis, start a new run from it")
    with safe_open(path, "pt") as state:
        if state.metadata()["train_dataset"] != fingerprint:
            raise ValueError(
                f"{checkpoint} was written while training on other rows, or on the same in another order: "
                "resume with the train_dataset the run was started with"
            )
