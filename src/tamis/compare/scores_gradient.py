"""Scores of training rows by gradients: their cosine with those of the validation rows, and LESS.

What a score is: see `tamis.compare.scores_text`. Gradients are those of the trainable parameters: with LoRA of the
adapter. LESS projects them to 8,192 random dimensions, so that they can be stored for tasks to come. Here they are not
stored: the mean over cosines with all validation rows is one product with the mean of their unit gradients, which is
exact and takes the memory of a few gradients.

Shape suffixes: R prepared training rows, P trainable parameters.
"""

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tamis.compare.adapted import warmed_up
from tamis.losses import evaluation_mode, fused_losses
from tamis.progress import track
from tamis.trainer import BilevelTrainer


def gradient_cosine(trainer: BilevelTrainer) -> Tensor:
    """Cosine of a row's gradient at the base model with the mean gradient of the validation rows.

    LESS at one checkpoint, without warm-up and without Adam.
    """
    assert trainer.validation_dataset is not None, "the trainer has validation rows"
    target_P = _mean(row_gradients(trainer, trainer.validation_dataset))
    score_R = torch.zeros(len(trainer.train_dataset))
    for i, gradient_P in enumerate(row_gradients(trainer, trainer.train_dataset)):
        # Copied at once: a list of small tensors between the gradients keeps the memory of each from being used again.
        score_R[i] = cosine_similarity(gradient_P, target_P, dim=0)
    return score_R


def less(trainer: BilevelTrainer) -> Tensor:
    """The influence of LESS (arXiv 2402.04333): a mean over checkpoints by their learning rates.

    As published: a warm-up on a random 5% of the rows for four epochs, a checkpoint after each; the cosine of Adam's
    step on a training row with the gradient of a validation row; the mean over the validation rows, which are one
    subtask. Ours: the parameters are those that the run trains, with its optimizer and rate, and not always a LoRA
    adapter; exact products instead of random projections.

    Raises:
        ValueError: the optimizer keeps no moments.
    """
    score_R, total = torch.zeros(len(trainer.train_dataset)), 0.0

    def add_checkpoint(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        nonlocal total
        assert trainer.validation_dataset is not None, "the trainer has validation rows"
        step = AdamStep(optimizer, trainable(trainer))
        target_P = _mean(normalize(g, dim=0) for g in row_gradients(trainer, trainer.validation_dataset))
        for i, gradient_P in enumerate(row_gradients(trainer, trainer.train_dataset)):
            score_R[i] += learning_rate * torch.dot(normalize(step(gradient_P), dim=0), target_P).cpu()
        total += learning_rate

    with warmed_up(trainer, add_checkpoint):
        return score_R / total


class AdamStep:
    """The direction in which Adam would go on next, by the gradient of one row; float32.

    Args:
        optimizer: after at least one step.
        parameters: in the order of the gradients.

    Raises:
        ValueError: it keeps no moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]):
        states = [optimizer.state.get(p, {}) for p in parameters]
        if not any("exp_avg" in state for state in states):
            raise ValueError("LESS follows the steps of Adam, and this optimizer has none: set `optim='adamw_torch'`")
        self.first_P, self.second_P = (
            _flat([state.get(name, torch.zeros_like(p)) for p, state in zip(parameters, states, strict=True)])
            for name in ("exp_avg", "exp_avg_sq")
        )
        group = optimizer.param_groups[0]
        self.betas, self.epsilon = group["betas"], group["eps"]
        self.num_steps = max(float(state.get("step", 0)) for state in states) + 1

    def __call__(self, gradient_P: Tensor) -> Tensor:
        """Bias-corrected first moment over the root of the second, both with this gradient taken in."""
        first_P = torch.lerp(gradient_P, self.first_P, self.betas[0]) / (1 - self.betas[0] ** self.num_steps)
        second_P = torch.lerp(gradient_P.square(), self.second_P, self.betas[1]) / (1 - self.betas[1] ** self.num_steps)
        step_P: Tensor = first_P / (second_P.sqrt() + self.epsilon)
        return step_P


def row_gradients(trainer: BilevelTrainer, dataset: Dataset) -> Iterator[Tensor]:
    """Gradients (P, float32) of the rows' token-mean losses, one row at a time, without dropout."""
    parameters = trainable(trainer)
    rows = dataset.select_columns(["input_ids", "labels"])
    with evaluation_mode(trainer.model):
        for row in track(rows, "gradients of rows", len(rows), is_shown=not trainer.args.disable_tqdm):
            batch = trainer.batches.collate_rows([row])
            inputs = {name: tensor.to(trainer.accelerator.device) for name, tensor in batch.items()}
            with trainer.accelerator.autocast():
                loss = fused_losses(trainer.model, inputs)[0]
            yield _flat(torch.autograd.grad(loss, parameters, materialize_grads=True))


def trainable(trainer: BilevelTrainer) -> list[Tensor]:
    """The trainable parameters, in the order of the model."""
    return [p for p in trainer.model.parameters() if p.requires_grad]


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


def _mean(vectors: Iterator[Tensor]) -> Tensor:
    total, count = next(vectors).clone(), 1
    for vector in vectors:
        total += vector
        count += 1
    return total / count
