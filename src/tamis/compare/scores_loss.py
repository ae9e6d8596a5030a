"""Scores of training rows by losses: perplexity, in context (ICA), conditional (CoLoR-Filter), reducible (RHO-loss).

What a score is: see `tamis.compare.scores_text`.

Shape suffixes: R prepared training rows, K examples in context.
"""

import torch
from datasets import Dataset
from torch import Tensor

from tamis.compare.adapted import adapted_to_validation, warmed_up
from tamis.compare.scores_text import embeddings
from tamis.losses import row_losses
from tamis.trainer import BilevelTrainer

_NUM_EXAMPLES = 3


def perplexity_filter(trainer: BilevelTrainer) -> Tensor:
    """Minus the base model's loss on the response: the rows of low perplexity are kept.

    The filter of CCNet (arXiv 1911.00359), by the base model instead of a 5-gram model, and of the response given the
    prompt. Others keep the rows in the middle (arXiv 2309.04564), or try low, middle and high (arXiv 2405.20541).
    """
    return -_losses(trainer, trainer.train_dataset)


def color_filter(trainer: BilevelTrainer) -> Tensor:
    """Base loss minus adapted loss: conditional loss reduction (CoLoR-Filter, arXiv 2406.10670), in nats per token.

    As published: the conditional model is the prior model fine-tuned on the target data, which are the validation rows
    here. Ours: the prior is the base model itself, not a smaller one; the means over tokens instead of sums, since rows
    are not packed to one length.
    """
    base_R = _losses(trainer, trainer.train_dataset)
    with adapted_to_validation(trainer):
        return base_R - _losses(trainer, trainer.train_dataset)


def rho_loss_offline(trainer: BilevelTrainer) -> Tensor:
    """Current loss minus irreducible loss, once and for all (RHO-loss, arXiv 2206.07137), in nats per token.

    As published: the irreducible loss is that by a model of held-out data, the validation rows here. Ours: RHO-loss
    measures the current loss at every step; here the current model is that after the warm-up of LESS, and stays.
    """
    with warmed_up(trainer):
        current_R = _losses(trainer, trainer.train_dataset)
    with adapted_to_validation(trainer):
        return current_R - _losses(trainer, trainer.train_dataset)


def in_context(trainer: BilevelTrainer) -> Tensor:
    """By how much 3 validation rows in the context lower the loss of the response: the ICA score (arXiv 2510.14459).

    As published: the three whose prompts are most like the row's, the nearest first; the sum over the response's
    tokens. Ours: prompts are compared by `embeddings` of the base model instead of all-mpnet-base-v2; an example is a
    whole row as it is trained on, without words around it; scores are not measured again while the model trains.
    Examples that do not fit into the model's context are left out, the least similar first.
    """
    rows, validation = trainer.train_dataset, trainer.validation_dataset
    assert validation is not None, "the trainer has validation rows"
    similarity_RV = embeddings(trainer, rows, of="prompt") @ embeddings(trainer, validation, of="prompt").T
    nearest_RK = similarity_RV.topk(min(_NUM_EXAMPLES, len(validation))).indices.tolist()
    examples = validation["input_ids"][:]
    limit = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    alone: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    inside: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for ids, labels, nearest_K in zip(rows["input_ids"], rows["labels"], nearest_RK, strict=True):
        context: list[int] = []
        for k in nearest_K:
            if limit is None or len(context) + len(examples[k]) + len(ids) <= limit:
                context += examples[k]
        labels = [-100, *labels[1:]]  # nothing comes before the first token, unless there are examples
        alone["input_ids"].append(ids)
        alone["labels"].append(labels)
        inside["input_ids"].append(context + ids)
        inside["labels"].append([-100] * len(context) + labels)
    num_tokens_R = torch.tensor([sum(label != -100 for label in labels) for labels in alone["labels"]])
    without_R = _losses(trainer, Dataset.from_dict(alone))
    return (without_R - _losses(trainer, Dataset.from_dict(inside))) * num_tokens_R


def _losses(trainer: BilevelTrainer, dataset: Dataset) -> Tensor:
    return row_losses(
        trainer.model,
        dataset,
        trainer.batches.collate_rows,
        trainer.accelerator,
        batch_size=trainer.args.per_device_eval_batch_size,
        title="" if trainer.args.disable_tqdm else "losses of rows",
    )
