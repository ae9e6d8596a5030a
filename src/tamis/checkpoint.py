"""What a checkpoint of tamis holds besides that of `transformers`: one safetensors file with all state of our own.

Its header says which run it belongs to: the settings that give the state its meaning, the other settings that were
given, and the fingerprints of the datasets. A run that goes on from it must mean the same.
"""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import SFTConfig

from tamis.config import BilevelConfig, Resolved
from tamis.files import write_atomically

logger = logging.getLogger(__name__)

STATE_FILE = "tamis.safetensors"
_LOG = "log."
# Settings of ours that a resumed run may change: they do not enter what has been learned. Of `scores` it is the folder
# that may change; their fingerprint is compared.
_CHANGEABLE = (
    "refine_on_error", "generation_batch_size", "generator", "vllm_mode", "vllm_server_base_url",
    "vllm_gpu_memory_utilization", "overwrite_output_dir", "scores",
)  # fmt: skip
# Settings of TRL that say which tokens a row has, or which rows a step has.
_OF_ROWS = (
    "seed", "data_seed", "dataloader_drop_last", "max_length", "truncation_mode", "completion_only_loss",
    "assistant_only_loss", "chat_template_path", "eos_token", "dataset_text_field",
)  # fmt: skip
_RESOLVED = ("prompts", "score_map", "selector_learning_rate", "scout_learning_rates", "rho_start")


class ResumableError(RuntimeError):
    """A step could not be begun, and all state is as after the step before: worth a checkpoint before it is raised."""


@dataclass(frozen=True)
class RunIdentity:
    """What a run must have in common with one that goes on from its checkpoint.

    Attributes:
        meaning: settings and fingerprints without which the state would mean something else.
        given: the other settings that differ from their defaults, and the fingerprint of the held-out rows.
    """

    meaning: dict[str, Any]
    given: dict[str, Any]


def identify(args: BilevelConfig, resolved: Resolved, fingerprints: dict[str, str], selector: str) -> RunIdentity:
    """The identity of a run. The rows of a step may be spread over other ranks and micro-batches.

    Args:
        fingerprints: of the datasets, by role.
        selector: its name, or that of its class.
    """
    own = {f.name for f in fields(args)} - {f.name for f in fields(SFTConfig)} - set(_CHANGEABLE)
    own.discard("per_device_validation_batch_size")
    meaning = {name: getattr(args, name) for name in sorted(own | set(_OF_ROWS))}
    meaning |= {name: getattr(resolved, name) for name in _RESOLVED}
    meaning |= {
        "selector": selector,
        "training rows a step": args.training_rows_per_step,
        "validation rows a step": resolved.validation_rows_per_step,
    }
    meaning |= {role: fingerprints.get(role) for role in ("train_dataset", "validation_dataset", "scores")}
    batch = ("per_device_train_batch_size", "per_device_validation_batch_size", "gradient_accumulation_steps")
    left = {n: v for n, v in args.given_settings.items() if n not in (*meaning, *batch, "output_dir")}
    others = {role: value for role, value in fingerprints.items() if role not in meaning}
    # As JSON gives it back, so that what was saved compares equal.
    return RunIdentity(*json.loads(json.dumps([meaning, left | others])))


def save_state(
    checkpoint: str | Path, state: dict[str, Tensor], log: dict[str, Tensor], num_tokens: int, identity: RunIdentity
) -> None:
    """Write the state of the weighting, and of the log.

    Args:
        log: what the next line of `metrics.jsonl` will be made of.
        num_tokens: trained on so far.
    """
    everything = state | {f"{_LOG}{name}": tensor for name, tensor in log.items()}
    tensors = {name: tensor.contiguous() for name, tensor in everything.items()}
    tensors["num_tokens"] = torch.tensor(num_tokens)
    metadata = {"meaning": json.dumps(identity.meaning), "given": json.dumps(identity.given)}
    write_atomically(Path(checkpoint) / STATE_FILE, lambda path: save_file(tensors, path, metadata))


def load_state(checkpoint: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The state of the weighting and of the log, and the number of tokens trained on."""
    state = load_file(Path(checkpoint) / STATE_FILE)
    num_tokens = int(state.pop("num_tokens"))
    log = {name.removeprefix(_LOG): state.pop(name) for name in list(state) if name.startswith(_LOG)}
    return state, log, num_tokens


def refuse_foreign(checkpoint: str | Path, identity: RunIdentity) -> None:
    """Check that a checkpoint belongs to a run that means the same; announce what has changed otherwise.

    Raises:
        ValueError: it was not written by tamis, or settings or rows that give its state a meaning have changed.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {STATE_FILE}: it was written with `save_only_model` or not by tamis, and cannot be "
            "resumed. Start a new run from its model"
        )
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "meaning" not in metadata:
        raise ValueError(f"{checkpoint} was written by an older version of tamis: start a new run")
    if changes := _changes(json.loads(metadata["meaning"]), identity.meaning):
        raise ValueError(
            f"{checkpoint} belongs to a run that means something else ({'; '.join(changes)}): resume with its settings "
            "and rows, or start a new run in another `output_dir`"
        )
    for change in _changes(json.loads(metadata["given"]), identity.given):
        logger.info(f"changed since {Path(checkpoint).name}: {change}")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, as ``name: before -> now``."""
    changes = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        if name.startswith(("train_dataset", "validation_dataset", "eval_dataset")):
            changes.append(f"{name}: other rows, or the same in another order")
        elif name == "scores":
            changes.append("scores: other probabilities, or a scout in place of them")
        else:
            changes.append(f"{name}: {before.get(name, 'default')} -> {now.get(name, 'default')}")
    return changes
