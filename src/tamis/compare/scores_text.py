"""Scores of training rows by what they say: at random, by n-grams (DSIR), by their nearest validation rows.

A score is a function of a trainer that has not trained yet. It gives one number for each prepared training row, higher
is better, and leaves the model as it was. The seed is that of the trainer's settings. One process.

Shape suffixes: R prepared training rows, V prepared validation rows, G n-grams of a text, D width of the model.
"""

import hashlib
import re
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import normalize

from tamis.losses import evaluation_mode
from tamis.trainer import BilevelTrainer

_NUM_BUCKETS = 10_000
_SMOOTHING = 1e-8
_WORDS = re.compile(r"\w+|[^\w\s]+")
_NUM_NEIGHBOURS = 5


def random_order(trainer: BilevelTrainer) -> Tensor:
    """Uniform numbers: the best of them are a random subset."""
    generator = torch.Generator().manual_seed(trainer.args.seed)
    return torch.rand(len(trainer.train_dataset), generator=generator)


def dsir(trainer: BilevelTrainer) -> Tensor:
    """Data Selection with Importance Resampling (arXiv 2302.03169): the best k scores are its sample of k rows.

    As published: words and punctuation of the lower-cased text, unigrams and bigrams in 10,000 hashed buckets, a bag of
    n-grams for the validation rows and one for the training rows, log importance weights, Gumbel noise (top-k of which
    is sampling without replacement). Ours: short rows are not left out.
    """
    rows = [ngram_buckets(text) for text in _texts(trainer, trainer.train_dataset)]
    targets = [ngram_buckets(text) for text in _texts(trainer, _validation(trainer))]
    ratio = np.log(_frequencies(targets) + _SMOOTHING) - np.log(_frequencies(rows) + _SMOOTHING)
    weight_R = np.array([ratio[buckets_G].sum() for buckets_G in rows])
    return torch.from_numpy(weight_R + np.random.default_rng(trainer.args.seed).gumbel(size=len(rows)))


def ngram_buckets(text: str) -> NDArray[np.int64]:
    """The buckets (G) of the unigrams and bigrams of a text."""
    words = _WORDS.findall(text.lower())
    ngrams = words + [" ".join(pair) for pair in pairwise(words)]
    hashes = [int(hashlib.sha256(ngram.encode()).hexdigest(), 16) for ngram in ngrams]
    return np.array([value % _NUM_BUCKETS for value in hashes], dtype=np.int64)


def _frequencies(rows: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    counts = np.bincount(np.concatenate(rows), minlength=_NUM_BUCKETS)
    return np.asarray(counts / counts.sum())


def _texts(trainer: BilevelTrainer, dataset: Dataset) -> list[str]:
    """Rows as they are trained on, without special tokens: whatever their format was."""
    texts: list[str] = trainer.processing_class.batch_decode(dataset["input_ids"][:], skip_special_tokens=True)
    return texts


def nearest_neighbours(trainer: BilevelTrainer) -> Tensor:
    """Mean cosine similarity with the 5 nearest validation rows, by embeddings of responses given their prompts.

    Such scores are the "representation" baselines of LESS (arXiv 2402.04333), which take the last token's state, and of
    Ivison et al. (arXiv 2503.01807), which weigh the states by position.
    """
    similarity_RV = embeddings(trainer, trainer.train_dataset) @ embeddings(trainer, _validation(trainer)).T
    return similarity_RV.topk(min(_NUM_NEIGHBOURS, similarity_RV.shape[1])).values.mean(dim=1)


def embeddings(trainer: BilevelTrainer, dataset: Dataset, of: Literal["response", "prompt"] = "response") -> Tensor:
    """Means of the base model's last hidden states of prepared rows, of length one (float32, CPU), shape rows x D.

    Args:
        of: ``response``: the states of the tokens that are trained on; they have seen the prompt. ``prompt``: of all
            other tokens. A row that has none of them gives all of its tokens.
    """
    rows = dataset.select_columns(["input_ids", "labels"])
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    size, found = trainer.args.per_device_eval_batch_size, torch.empty(0)
    with evaluation_mode(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        for first in range(0, len(order), size):
            places = order[first : first + size]
            batch = trainer.batches.collate_rows([rows[i] for i in places])
            inputs = {name: tensor.to(trainer.accelerator.device) for name, tensor in batch.items()}
            labels_BT = inputs.pop("labels")
            hidden_BTD = backbone(trainer.model)(**inputs, use_cache=False).last_hidden_state
            mask_BT = inputs["attention_mask"].bool()
            wanted_BT = mask_BT & ((labels_BT == -100) if of == "prompt" else (labels_BT != -100))
            mask_BT = torch.where(wanted_BT.any(dim=1, keepdim=True), wanted_BT, mask_BT)
            mean_BD = (hidden_BTD.float() * mask_BT.unsqueeze(2)).sum(dim=1) / mask_BT.sum(dim=1, keepdim=True)
            found = found if len(found) else torch.empty(len(rows), mean_BD.shape[1])
            found[places] = normalize(mean_BD, dim=1).cpu()
    return found


def backbone(model: nn.Module) -> nn.Module:
    """The language model without its head; all forwards of rows go through it, with adapters or without."""
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found: nn.Module = causal.base_model
    return found


def _validation(trainer: BilevelTrainer) -> Dataset:
    assert trainer.validation_dataset is not None, "the trainer has validation rows"
    return trainer.validation_dataset
