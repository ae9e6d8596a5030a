"""The mathematics of bilevel data selection, as pure functions of tensors (no trainer, no state).

Shape suffixes: B rows of a batch, of which L training rows and U validation rows; T tokens.

Lower data are the doubtful rows (``train_dataset``), upper data the trusted ones (``validation_dataset``).
With ``l`` the loss of a row, ``w`` its weight and ``rho`` the share of the upper level, one step descends

    rho * mean_upper(l) + (1 - rho) * mean_lower(w * l)

and the weights follow the *excess loss* ``e = l(theta) - l(theta_reference)``, which is the gradient of the penalty
objective in ``w`` (arXiv 2302.05185 for the penalty, arXiv 2511.21056 for its use on training rows).
"""

import math

import torch
from torch import Tensor


def example_losses(log_probs_BT: Tensor, label_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Token-mean negative log-likelihood of every row, and how many tokens it was taken over.

    Args:
        log_probs_BT: natural log-probability of each label, 0 where ``label_mask_BT`` is False.
        label_mask_BT: True on the tokens that are trained on. Both come shifted from the same fused LM head.

    Returns:
        ``nll_B`` in nats per token (0 for a row without tokens) and ``num_tokens_B`` (int64).
    """
    assert log_probs_BT.shape == label_mask_BT.shape, "labels must be shifted once, by the fused LM head"
    num_tokens_B = label_mask_BT.sum(dim=1)
    return -log_probs_BT.sum(dim=1) / num_tokens_B.clamp(min=1), num_tokens_B


def row_coefficients(weights_L: Tensor, rho: float, share_B: Tensor) -> Tensor:
    """Coefficients of a micro-batch's rows, the L training rows first, then the validation rows.

    The one place where an algorithm reaches the model: the loss of a step is ``sum c * l``.

    Args:
        weights_L: weights of the training rows, mean one over the training dataset.
        rho: share of the upper level, in [0, 1].
        share_B: what each row counts in the mean over its level. They sum to one over all rows of a level in the step,
            all micro-batches and ranks together: ``1 / num_rows`` for the mean of examples,
            ``num_tokens / total_tokens`` for the mean of tokens.
    """
    num_training = len(weights_L)
    return torch.cat([(1.0 - rho) * weights_L * share_B[:num_training], rho * share_B[num_training:]])


def effective_sample_size(weights: Tensor) -> float:
    """``(sum w)^2 / sum w^2``, from 1 (one row has all of the weight) to ``len(weights)`` (all are equal)."""
    weights = weights.double()
    return (weights.sum() ** 2 / weights.square().sum().clamp(min=torch.finfo(torch.float64).tiny)).item()


def weight_entropy(weights: Tensor) -> float:
    """Entropy in nats of the weights read as a distribution over rows, at most ``log(len(weights))``."""
    probabilities = weights.double() / weights.double().sum()
    return float(torch.special.entr(probabilities).sum())


def penalty_gap(weights_B: Tensor, excess_B: Tensor) -> Tensor:
    """``mean(w * (l - l_reference))`` in nats per token: how far the lower level is from the reference's value.

    Zero or less when the model fits the weighted rows as well as the reference does. With reference ``zero`` it is
    the weighted lower loss itself, with ``tracked`` the value-function gap of V-PBGD (arXiv 2302.05185, eq. 4).
    """
    return (weights_B * excess_B).mean()


def response_weights(
    generator_log_prob_G: Tensor, sampling_log_prob_G: Tensor, *, temperature: float, dim: int = -1
) -> Tensor:
    """BMO weights of the responses that a model has just generated: self-normalised along ``dim``, sum one.

    The smoothed minimum ``-tau log sum_y exp(-l(y) / tau)`` over *all* responses weighs each by ``p^(1 / tau)``; of
    those drawn from ``q`` each then counts ``p^(1 / tau) / q`` (our derivation, docs/refining.md).

    Args:
        generator_log_prob_G: nats, of the responses under the model that generated them; their sums over tokens, or
            means for weights of a token on average.
        sampling_log_prob_G: the same under the distribution they were drawn from.
        temperature: tau; smaller is sharper. At 1, with nothing changed in sampling, all weights are equal.
    """
    assert temperature > 0
    return torch.softmax(generator_log_prob_G / temperature - sampling_log_prob_G, dim=dim)


def importance_ratio(log_prob: Tensor, generator_log_prob: Tensor, *, temperature: float, cap: float) -> Tensor:
    """``min((p / p_generator)^(1 / tau), cap)`` under stop-gradient: what a response counts as the model moves on.

    Together with drawing by `response_weights` it makes the expected gradient that of ``p^(1 / tau)`` for the present
    ``p``: exactly, times the mean of the weights before normalisation, where nothing is capped (docs/refining.md). It
    needs nothing of the other responses, and no memory of earlier visits.

    Args:
        log_prob, generator_log_prob: nats, of a response under the model now and under the one that generated it.
        temperature: tau.
        cap: largest value.
    """
    assert temperature > 0 and cap > 0
    return torch.exp(((log_prob.detach() - generator_log_prob) / temperature).clamp(max=math.log(cap)))


def rho_at(progress: float, rho_start: float, rho_end: float, decay_until: float) -> float:
    """Share of the upper level at ``progress`` in [0, 1] of the steps: linear until ``decay_until``, then constant."""
    if decay_until <= 0:
        return rho_end
    return rho_start + (rho_end - rho_start) * min(progress / decay_until, 1.0)
