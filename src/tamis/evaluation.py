"""Evaluation by rows: what `eval_loss` means does not depend on the batch size, the ranks or `compute_metrics`.

Shape suffixes: B rows of a batch, R rows of a dataset; 5 figures of each row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from tamis.losses import fused_forward


class RowEvaluation(SFTTrainer):
    """An [`~trl.SFTTrainer`] whose `evaluate` and `predict` measure rows, all of the same weight.

    Metrics, under the prefix of the data set (`eval`, `eval_NAME` for a dict of data sets, `test` for `predict`):

    - ``loss``: mean over rows of the token-mean loss, in nats per token. TRL's is a mean over batches.
    - ``teacher_forced_match``: share of rows whose every trained token is the model's first choice given the tokens
      before it. It equals greedy decoding's exact match for rows of a prompt and one response that were not truncated;
      not where other tokens are trained on too, or of truncated rows (greedy decoding may never stop).
    - ``mean_token_accuracy``, ``entropy`` (nats): mean over trained tokens. TRL's are means over batches.
    """

    _evaluated: list[Tensor]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See [`~transformers.Trainer`]; logits are made only where they are wanted: another forward pass."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll_B, outputs = fused_forward(model, inputs)
            is_match_B = (outputs.is_top1.bool() | ~outputs.label_mask).all(dim=1)
            sums = (outputs.label_mask, outputs.is_top1, outputs.entropy)
            figures = (nll_B, is_match_B, *(figure_BT.sum(dim=1) for figure_BT in sums))
            rows_B5 = torch.stack([figure_B.float() for figure_B in figures], dim=1)
            # By rows: the last batches of some ranks hold rows a second time, which only this can leave out again.
            self._evaluated.append(self.accelerator.gather_for_metrics(rows_B5).cpu())
            if prediction_loss_only:
                return nll_B.mean(), None, None
            logits = model(**{name: t for name, t in inputs.items() if name != "labels"}, use_cache=False).logits
        return nll_B.mean(), logits, inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """See [`~transformers.Trainer`]."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:  # dataloader_drop_last may leave nothing
            metrics = self._row_metrics(torch.cat(self._evaluated))
            assert output.metrics is not None
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def evaluated_losses(self) -> Tensor:
        """Token-mean loss of each row of the data set that was measured last, in its order, in nats per token."""
        return torch.cat(self._evaluated)[:, 0]

    def _row_metrics(self, rows_R5: Tensor) -> dict[str, float]:
        nll_R, is_match_R, num_tokens_R, num_top1_R, entropy_R = rows_R5.double().unbind(dim=1)
        is_finite_R = nll_R.isfinite()
        if self.args.logging_nan_inf_filter and is_finite_R.any():
            nll_R = nll_R[is_finite_R]
        num_tokens = num_tokens_R.sum().clamp(min=1)
        return {
            "loss": nll_R.mean().item(),
            "teacher_forced_match": is_match_R.mean().item(),
            "mean_token_accuracy": (num_top1_R.sum() / num_tokens).item(),
            "entropy": (entropy_R.sum() / num_tokens).item(),
        }
