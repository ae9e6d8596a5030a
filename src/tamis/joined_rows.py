"""`JoinedRows`: the trainer's side of `--padding_free`, whose forward passes are those of `tamis.padding_free`.

Shape suffixes: B rows of a batch, T tokens of the longest one.
"""

import math
from copy import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from tamis.losses import Collate, evaluation_mode, fused_forward

_NUM_CANDIDATES = 16  # rows, the longest of which is tried


class JoinedRows(SFTTrainer):
    """An [`~trl.SFTTrainer`] whose `padding_free` leaves batches as they are, with positions for `fused_forward`.

    TRL's own makes batches that have no rows, and does not go with `max_length`.

    Raises:
        ValueError: `padding_free` with a model that mixes rows, see `refuse_mixed_rows`.
    """

    data_collator: Any
    model: Any
    train_dataset: Any

    def __init__(self, model: Any, args: SFTConfig, **kwargs: Any):
        settings = args
        if args.padding_free:
            settings = copy(args)
            settings.padding_free = False
        super().__init__(model, settings, **kwargs)
        if args.padding_free:
            self.data_collator.return_position_ids = True
            token_ids = max(self.train_dataset[:_NUM_CANDIDATES]["input_ids"], key=len)
            refuse_mixed_rows(self.model, token_ids, self.data_collator, self.accelerator)


def refuse_mixed_rows(model: nn.Module, token_ids: list[int], collate: Collate, accelerator: Accelerator) -> None:
    """Refuse a model whose rows would not have the same losses without padding as with it.

    Its attention may not go by positions, or it may have layers that know of none. A row and its halves are tried. The
    halves share a line: the second must not notice what the first one holds.

    Args:
        token_ids: of a row.
        collate: with positions.

    Raises:
        ValueError: with the remedy.
    """
    half = (len(token_ids) + 1) // 2
    first, second = token_ids[:half], token_ids[half:]

    def measured(first: list[int], is_joined: bool = True) -> tuple[Tensor, Tensor]:
        """The losses of all three (B), and the log-probabilities of the last one (T)."""
        rows = [{"input_ids": ids, "labels": ids} for ids in (token_ids, first, second) if ids]
        inputs = send_to_device(collate(rows), next(model.parameters()).device)
        loss_B, outputs = fused_forward(model, inputs if is_joined else _without_positions(inputs))
        return loss_B, outputs.log_probs[-1]

    with evaluation_mode(model), torch.no_grad(), accelerator.autocast():
        expected_B, _ = measured(first, is_joined=False)
        try:
            (loss_B, log_prob_T), (_, other_log_prob_T) = measured(first), measured(first[::-1])
            loss_error = (loss_B - expected_B).abs().max().item()
            leak = (log_prob_T - other_log_prob_T).abs().max().item()
        except TypeError:  # the model takes no positions
            loss_error = leak = math.nan
    is_float32 = accelerator.mixed_precision == "no" and model.dtype == torch.float32
    if not (loss_error < (1e-4 if is_float32 else 0.02) and leak < (5e-6 if is_float32 else 0.02)):
        raise ValueError(
            "padding_free: this model does not keep rows apart that share a line (log-probabilities change by "
            f"{leak:.1e}, losses by {loss_error:.1e} nats). Choose another `attn_implementation`, or leave "
            "`padding_free` off"
        )


def _without_positions(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
