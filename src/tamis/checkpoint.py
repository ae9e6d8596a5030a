"""What a checkpoint of tamis holds besides that of `transformers`: one safetensors file with all state of our own."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tamis.files import write_atomically

STATE_FILE = "tamis.safetensors"


class ResumableError(RuntimeError):
    """A step could not be begun, and all state is as after the step before: worth a checkpoint before it is raised."""


def save_state(checkpoint: str | Path, state: dict[str, Tensor], num_tokens: int, fingerprint: str) -> None:
    """Write the state of the weighting.

    Args:
        num_tokens: trained on so far.
        fingerprint: of the training rows, so that the state is never applied to others.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    tensors["num_tokens"] = torch.tensor(num_tokens)
    metadata = {"train_dataset": fingerprint}
    write_atomically(Path(checkpoint) / STATE_FILE, lambda path: save_file(tensors, path, metadata))


def load_state(checkpoint: str | Path) -> tuple[dict[str, Tensor], int]:
    """The state of the weighting, and the number of tokens trained on."""
    state = load_file(Path(checkpoint) / STATE_FILE)
    num_tokens = int(state.pop("num_tokens"))
    return state, num_tokens


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
