"""References for the excess loss ``e = l(theta) - l(theta_reference)`` of a training row.

| name      | theta_reference                                      | extra cost                                     |
|-----------|------------------------------------------------------|------------------------------------------------|
| `zero`    | none: the reference loss is 0 (separable data)       | nothing                                        |
| `base`    | the model before training                            | one forward per row and run; 4 bytes a row     |
| `tracked` | descends the weighted lower level alone, in parallel | a forward and backward of the lower rows a step |

With LoRA `base` is the trained parameters as they were and `tracked` a second adapter; otherwise each copies the model.

Shape suffixes: B training rows of a batch, N rows of the training dataset, T tokens.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tamis.losses import evaluation_mode, exchanged, fused_losses, trainable_parameters

_TRACKED_ADAPTER = "tamis_tracked"


class ZeroReference:
    """``v = 0``: right when the data are separable, that is when one model fits every row exactly (2511.21056)."""

    description = "zero: the loss itself is the excess loss"

    def losses(self, inputs: dict[str, Any], example_ids_B: Tensor, known_B: Tensor) -> Tensor:
        """Reference losses (float32, on the CPU) of the training rows of a micro-batch.

        Args:
            known_B: for rows with a generated response the reference loss of that response, NaN for the others.
        """
        return torch.zeros(len(example_ids_B))

    def backward(self, coefficients_B: Tensor) -> None:
        """Called once per micro-batch with the rows' coefficients in the lower level; for references that learn."""

    def step(self, learning_rate: float) -> None:
        """Called once per optimizer step."""

    @contextlib.contextmanager
    def left_out_of_saving(self) -> Iterator[None]:
        """Within it, saving the model saves nothing of the reference: that is in `state_dict`."""
        yield

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


class BaseReference(ZeroReference):
    """The model before training, each row measured when it is first seen (no dropout) and remembered.

    Args:
        model: the model to be trained, before its first step. Of a `PeftModel` a copy of the adapter is kept, on the
            CPU; of any other model a frozen copy.
        num_examples: N.
    """

    def __init__(self, model: nn.Module, num_examples: int):
        self.loss_N = torch.full((num_examples,), math.nan, dtype=torch.float32)
        self._model = model
        if isinstance(model, PeftModel):
            self._adapter = trainable_parameters(model)
            self.description = "base: the model with its adapter as it was, no second copy of the model"
        else:
            self._model = copy.deepcopy(model).requires_grad_(False).eval()
            self.description = "base: a frozen copy of the model (train with LoRA to do without)"

    def losses(self, inputs: dict[str, Any], example_ids_B: Tensor, known_B: Tensor) -> Tensor:
        """See `ZeroReference`."""
        is_new_B = self.loss_N[example_ids_B].isnan() & known_B.isnan()
        if is_new_B.any():
            rows = is_new_B.nonzero().squeeze(1).to(inputs["input_ids"].device)
            with torch.no_grad(), self._as_before_training():
                new_losses = fused_losses(self._model, {name: tensor[rows] for name, tensor in inputs.items()})
            self.loss_N[example_ids_B[is_new_B]] = new_losses.float().cpu()
        return torch.where(known_B.isnan(), self.loss_N[example_ids_B], known_B)

    @contextlib.contextmanager
    def _as_before_training(self) -> Iterator[None]:
        if not isinstance(self._model, PeftModel):
            yield
            return
        with evaluation_mode(self._model), exchanged(self._model, self._adapter):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """See `ZeroReference`."""
        return {"loss_N": self.loss_N}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `ZeroReference`."""
        self.loss_N = state["loss_N"].clone()


class TrackedReference(ZeroReference):
    """``theta'``: follows ``argmin sum_i w_i l_i`` by its own AdamW steps on the weighted training rows alone.

    The excess loss against it is the gradient in ``w`` of the value-function penalty (V-PBGD, arXiv 2302.05185): what
    both models memorise alike cancels out and the doing of the validation rows remains.

    Args:
        model: the model to be trained, before its first step. A `PeftModel` gets a second adapter, equal to its first
            one; any other model is copied.
        reduce_gradient: sums a gradient over the ranks, in place (the coefficients sum to one over all of them).
        max_grad_norm: as the model's own; 0 clips nothing.
    """

    _model: Any

    def __init__(self, model: nn.Module, reduce_gradient: Callable[[Tensor], None], max_grad_norm: float = 1.0):
        self.max_grad_norm = max_grad_norm
        self._nll_B: Tensor | None = None
        self._reduce_gradient = reduce_gradient
        if isinstance(model, PeftModel):
            self._model, self._trained_adapter = model, model.active_adapter
            self.parameters = self._add_adapter()
            self.description = "tracked: a second adapter on the same base model"
        else:
            self._model = copy.deepcopy(model)
            self.parameters = [p for p in self._model.parameters() if p.requires_grad]
            self.description = "tracked: a second model (train with LoRA to need only a second adapter)"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)

    def _add_adapter(self) -> list[nn.Parameter]:
        model, trained = self._model, self._trained_adapter
        if model.peft_config[trained].modules_to_save:
            raise ValueError(
                "reference 'tracked' cannot share a base model whose modules_to_save are trained: "
                "remove them from the PEFT config, or choose `reference='base'`"
            )
        model.add_adapter(_TRACKED_ADAPTER, model.peft_config[trained])
        parameters = dict(model.named_parameters())
        tracked = []
        for name, parameter in parameters.items():
            if _TRACKED_ADAPTER in name.split("."):
                parameter.data.copy_(parameters[name.replace(_TRACKED_ADAPTER, trained)].data)
                tracked.append(parameter)
        model.set_adapter(trained)
        return tracked

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        """The tracked adapter is on: in the backward pass too, where gradient checkpointing runs the forward again."""
        if isinstance(self._model, PeftModel):
            self._model.set_adapter(_TRACKED_ADAPTER)
        try:
            yield
        finally:
            if isinstance(self._model, PeftModel):
                self._model.set_adapter(self._trained_adapter)

    @contextlib.contextmanager
    def left_out_of_saving(self) -> Iterator[None]:
        if not isinstance(self._model, PeftModel):
            yield
            return
        # An attribute of the instance hides the method of the class.
        save_trained = partial(self._model.save_pretrained, selected_adapters=[self._trained_adapter])
        vars(self._model)["save_pretrained"] = save_trained
        try:
            yield
        finally:
            del vars(self._model)["save_pretrained"]

    def losses(self, inputs: dict[str, Any], example_ids_B: Tensor, known_B: Tensor) -> Tensor:
        """See `ZeroReference`."""
        with self._active():
            self._model.train()
            self._nll_B = fused_losses(self._model, inputs)
        return self._nll_B.detach().float().cpu()

    def backward(self, coefficients_B: Tensor) -> None:
        """See `ZeroReference`."""
        assert self._nll_B is not None, "losses() comes first"
        with self._active():
            (coefficients_B.to(self._nll_B.device) * self._nll_B).sum().backward()
        self._nll_B = None

    def step(self, learning_rate: float) -> None:
        """See `ZeroReference`."""
        for parameter in self.parameters:
            if parameter.grad is None:  # this rank had no training rows in the step, but another may wait for it
                parameter.grad = torch.zeros_like(parameter)
            self._reduce_gradient(parameter.grad)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        # Gone before the trainer clips "all gradients of the model": the adapter is part of the same model.
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """See `ZeroReference`."""
        state = {}
        for i, parameter in enumerate(self.parameters):
            state[f"parameter.{i}"] = parameter.detach().cpu()
            for name, tensor in self.optimizer.state[parameter].items():
                state[f"{name}.{i}"] = tensor.detach().cpu()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `ZeroReference`."""
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(state[f"parameter.{i}"])
            moments = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {
                name: state[f"{name}.{i}"].clone().to("cpu" if name == "step" else parameter.device)
                for name in moments
                if f"{name}.{i}" in state
            }


def make_reference(
    name: str,
    model: nn.Module,
    num_examples: int,
    *,
    reduce_gradient: Callable[[Tensor], None] = lambda gradient: None,
    max_grad_norm: float = 1.0,
) -> ZeroReference:
    """The reference called ``name`` for ``model`` as it is before its first step; see the table above.

    Args:
        num_examples: N.
        reduce_gradient, max_grad_norm: see `TrackedReference`.
    """
    if name == "base":
        return BaseReference(model, num_examples)
    if name == "tracked":
        return TrackedReference(model, reduce_gradient, max_grad_norm)
    assert name == "zero", name
    return ZeroReference()
