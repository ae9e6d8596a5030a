"""Runs that tests/test_distributed.py compares: the same script on one rank and, under torchrun, on two."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conftest import ONE_TRIAL, PLAIN, lora, pairs, two_kinds
from datasets import Dataset, disable_progress_bars

from tamis import BilevelConfig, BilevelTrainer
from tamis.ranks import trained, whole

# Plain gradient descent: Adam would blow rounding of tiny gradients up to whole steps. 19 rows: the last step of an
# epoch has fewer rows than the others, and of unlike numbers on the two ranks. A soft rule keeps rounding small.
COMMON = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2.0}
REFINING = {"refine_fraction": 0.5, "refine_start": 0, "refine_every": 2, "num_generations": 2, "max_new_tokens": 4}
SAVED = ONE_TRIAL | REFINING | {"save_strategy": "steps", "save_steps": 5}  # of ten
# Its responses seldom end: it needs more of them, and longer ones.
LORA = {
    "peft_config": True,
    "refine_policy": "random",
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_new_tokens": 16,
}
FOLLOWING = {"selector": "mirror", "selector_learning_rate": 0.1}
BY_LENGTH = {"padding_free": True, "train_sampling_strategy": "batch_rebalance"}
RUNS = {
    "scores follow the steps": FOLLOWING,
    "scouted": ONE_TRIAL,
    "tokens, accumulation": FOLLOWING | BY_LENGTH | {"loss_reduction": "token", "gradient_accumulation_steps": 2},
    "tracked": FOLLOWING | {"reference": "tracked", "reference_learning_rate": 1e-4},
    "refining": FOLLOWING | REFINING,
    "scouted, refining": SAVED,
    "lora": ONE_TRIAL | REFINING | LORA,
    "resumed": SAVED | {"resumes": "one/scouted, refining"},
}
# On two ranks only, and last: the process stays with FSDP. Torch cannot load the state of SGD, which has none.
_ADAMW = SAVED | {"optim": "adamw_torch", "learning_rate": 1e-3}
SHARDED = {
    "fsdp2": ONE_TRIAL | REFINING,
    "fsdp2, lora": RUNS["lora"],
    "fsdp2, adamw": _ADAMW,
    "fsdp2, resumed": _ADAMW | {"resumes": "two/fsdp2, adamw"},
    "fsdp2, fp16": ONE_TRIAL | {"fp16": True},
}
# On two ranks, where the second cannot generate. The last one leaves the first alone in a forward: no run can follow.
_FAILING = {"selector": "none", "refine_policy": "random", **REFINING}
FAILING = {
    "generator": _FAILING | {"fails": "generator"},
    "fsdp2, forward": _FAILING | {"fails": "forward"},
}
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
METRICS = (
    "loss", "grad_norm", "training_loss", "weighted_training_loss", "validation_loss", "penalty_gap", "rho", "ess",
    "ess_ratio", "weight_entropy", "num_tokens", "eval_loss",
)  # fmt: skip


def fsdp_on_cpus(init):
    """accelerate turns FSDP on for accelerators only; torch has it on CPUs too."""

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision == "fp16":
                fsdp_plugin.set_mixed_precision("fp16")

    return init_with_fsdp


def fp16_on_cpus(init):
    """accelerate scales the loss on accelerators only. The first scale overflows, and its step is skipped."""

    def init_with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)

    return init_with_scaler


def run(model_dir: str, folder: Path, global_batch_size: int, settings: dict) -> dict:
    """What a run leads to, as far as it should not depend on the number of ranks."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    backend = {"ddp_backend": "gloo"} if num_ranks > 1 else {}
    settings = COMMON | {"per_device_train_batch_size": global_batch_size // num_ranks} | settings
    peft_config = lora() if settings.pop("peft_config", False) else None
    resumes, fails = settings.pop("resumes", None), settings.pop("fails", None)
    checkpoint = resumes and str(folder.parent.parent / resumes / "checkpoint-5")
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # of an earlier run
    torch.manual_seed(0)
    args = BilevelConfig(output_dir=str(folder), **PLAIN | settings, eval_strategy="epoch", **backend)
    train, validation = pairs(10) + pairs(9, 50, wrong=True), pairs(6, 90)
    if args.selector == "scout":
        right, wrong, validation = two_kinds()
        train = right[:10] + wrong[:9]
    trainer = BilevelTrainer(
        model_dir,
        args,
        train_dataset=Dataset.from_list(train),
        validation_dataset=Dataset.from_list(validation),
        eval_dataset=Dataset.from_list(pairs(5, 100)),
        peft_config=peft_config,
    )
    weighting, num_refined = trainer.weighting, []
    before_step = weighting.before_step

    def noted(step: int, batches: list) -> list:
        found = before_step(step, batches)
        num_refined.append(sum(len(batch.substitutes) for batch in found))
        return found

    weighting.before_step = noted
    if fails:
        return failure_of(trainer, fails)
    trainer.train(checkpoint)
    return {
        "num_ranks": trainer.args.world_size,
        "history": [{n: line[n] for n in METRICS if n in line} for line in trainer.state.log_history],
        "scores": weighting.row_weights.all_scores().tolist(),
        "weights": weighting.row_weights.all_weights().tolist(),
        "losses": weighting.row_weights.last_loss_N.tolist(),
        "num_updates": weighting.row_weights.num_updates_N.tolist(),
        "parameters": {n: whole(p).tolist() for n, p in trained(trainer.model).items()},
        "p_right": weighting.row_weights.p_right_N().nan_to_num(-1).tolist(),
        "trials": weighting.scouting.outcome and [
            [t.evidence, t.criterion, t.error, *t.rank_V] for t in weighting.scouting.outcome.trials
        ],
        "num_refined": num_refined,
        "responses": weighting.refiner and {
            i: [list(r.token_ids) for r in row.responses] for i, row in weighting.refiner.buffer.rows.items()
        },
    }  # fmt: skip


def failure_of(trainer: BilevelTrainer, fails: str) -> dict:
    """How a run ends whose second rank fails: outright, or in the middle of a forward."""

    def fail(*args: object) -> None:
        raise RuntimeError("out of order")

    if trainer.args.process_index == 1 and fails == "generator":
        trainer.weighting.refiner.generator.generate = fail
    elif trainer.args.process_index == 1:
        layer = trainer.model.model.layers[1]
        layer.register_forward_pre_hook(lambda *args: None if torch.is_grad_enabled() else fail())
    try:
        trainer.train()
    except RuntimeError as error:
        return {"failure": f"{type(error).__name__}: {error}", "step": trainer.state.global_step}
    return {"failure": None}


if __name__ == "__main__":
    model_dir, folder = sys.argv[1], Path(sys.argv[2])
    disable_progress_bars()
    AcceleratorState.__init__ = fsdp_on_cpus(AcceleratorState.__init__)
    Accelerator.__init__ = fp16_on_cpus(Accelerator.__init__)
    runs = RUNS if "WORLD_SIZE" not in os.environ else RUNS | SHARDED | FAILING
    for name, settings in runs.items():
        found = run(model_dir, folder / name, 4, settings | (FSDP if name.startswith("fsdp2") else {}))
        rank = os.environ.get("RANK", "0")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
