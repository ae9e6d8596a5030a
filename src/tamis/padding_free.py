"""Forward passes without padding: `--padding_free` lays the rows of a batch end to end, and parts their outputs again.

Everywhere else batches stay padded, so that rows can be picked and counted. Attention keeps rows apart that share a
line because their positions begin anew. Flash attention takes all rows in one line, as in TRL. The others compute every
pair of tokens of a line, so that one line would cost the square of all tokens: there a line is as long as the longest
row, other rows share lines where they fit, and nothing is computed that padding would not compute.

Shape suffixes: B rows of a batch, T tokens of the longest one; K lines of W tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.utils.generic import is_flash_attention_requested

_OF_TOKENS = ("log_probs", "label_mask", "entropy", "is_top1")
_FILL = {"input_ids": 0, "position_ids": 0, "shift_labels": -100}  # a position of 0 each: nothing looks at such a token


def joined_forward(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The outputs of a fused LM head, those of each token (B, T), from rows that are laid end to end.

    Args:
        inputs: of TRL's collator: ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids``, all (B, T).
    """
    others = {name: value for name, value in inputs.items() if name not in ("attention_mask", "labels")}
    is_token_BT = inputs["attention_mask"].bool()
    lengths = is_token_BT.sum(dim=1).tolist()
    # The losses of experts are means over tokens: there must be none that is nobody's.
    in_one_line = _has_flash_attention(model) or "output_router_logits" in inputs
    width = sum(lengths) if in_one_line else max(lengths)
    starts = first_fit(lengths, width)
    place_BT = torch.tensor(starts, device=is_token_BT.device)[:, None] + inputs["position_ids"]
    # The label of a row's last token is not the first token of the next row.
    others["shift_labels"] = pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    for name, fill in _FILL.items():
        tokens = others[name].new_full((max(starts) // width + 1, width), fill)
        tokens.view(-1)[place_BT[is_token_BT]] = others[name][is_token_BT]
        others[name] = tokens
    if in_one_line:
        others |= _boundaries(lengths, starts, is_token_BT.device)
    outputs = model(**others, use_cache=False, fused_lm_head=True)
    for name in _OF_TOKENS:
        outputs[name] = outputs[name].flatten()[place_BT].masked_fill(~is_token_BT, 0)
    return outputs


def first_fit(lengths: Sequence[int], width: int) -> list[int]:
    """Where each row begins among the tokens of all lines: the longest rows first, each in the first line with room.

    Args:
        lengths: tokens of each row, none more than ``width``, the tokens of a line.
    """
    starts, ends = [0] * len(lengths), list[int]()
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        line = next((line for line, end in enumerate(ends) if end + lengths[row] <= width), len(ends))
        if line == len(ends):
            ends.append(0)
        starts[row] = line * width + ends[line]
        ends[line] += lengths[row]
    return starts


def _boundaries(lengths: Sequence[int], starts: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Where the rows of one line end, for kernels that do not read positions; the names are transformers'."""
    ends = torch.tensor([*sorted(starts), sum(lengths)], dtype=torch.int32, device=device)
    row_of_W = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device=device), ends.diff())
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "seq_idx": row_of_W[None], **longest}


def _has_flash_attention(model: nn.Module) -> bool:
    config = next(module.config for module in model.modules() if hasattr(module, "config"))
    return bool(is_flash_attention_requested(config))
