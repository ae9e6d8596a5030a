"""What a run needs: by arithmetic, held against a run; and how it is said."""

import pytest
from conftest import lora, pairs
from torch import nn

from tamis import BilevelConfig
from tamis.check import advice
from tamis.check.cost import Cost, Need, Time, disk_need, duration, least_memory, num_events, parameters_of, size

STEPS = {"selector": "none", "rho": 0.0, "learning_rate": 0.0, "save_strategy": "steps"}


def bytes_of(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 2, "max_steps": 6},
        {"save_steps": 2, "max_steps": 5},
        {"save_steps": 0.5, "max_steps": 4},
        {"save_steps": 1, "max_steps": 3, "save_only_model": True},
        {"save_strategy": "epoch", "num_train_epochs": 2},
        {"save_strategy": "no", "max_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_disk_is_what_a_run_takes(bilevel, tmp_path, settings, is_adapter):
    trainer = bilevel(pairs(8), peft_config=lora() if is_adapter else None, **STEPS | settings)
    need = disk_need(trainer.model, trainer.args, trainer.num_steps(), 8)
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    # The rest is the tokenizer and small text files, which do not grow with the model.
    taken = sum(path.stat().st_size for path in run.rglob("*") if path.suffix in (".safetensors", ".pt"))
    num_files = len([*run.rglob("*.safetensors"), *run.rglob("*.pt")])
    assert abs(taken - need.needed) < 0.05 * taken + 16_000 * num_files
    assert need.available > 0 and need.fits


def test_old_checkpoints_that_are_removed_take_no_room(bilevel):
    trainer = bilevel(pairs(8), **STEPS | {"save_steps": 1, "max_steps": 20})
    trainer.args.save_total_limit = 1
    two = disk_need(trainer.model, trainer.args, 20, 8).needed  # the newest is there before the oldest goes
    trainer.args.save_total_limit = None
    assert two < disk_need(trainer.model, trainer.args, 20, 8).needed / 5


@pytest.mark.parametrize(
    ("strategy", "every", "num_steps", "num_epochs", "expected"),
    [("steps", 2, 7, 3, 3), ("steps", 0.5, 7, 3, 1), ("epoch", None, 7, 2.5, 3), ("no", 2, 7, 3, 0)],
)
def test_how_often_something_is_due(strategy, every, num_steps, num_epochs, expected):
    assert num_events(strategy, every, num_steps, num_epochs) == expected


def test_parameters_and_the_least_memory():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 5, bias=False)).bfloat16()
    model[0].requires_grad_(False)
    assert vars(parameters_of(model)) == {"num": 150, "num_trained": 50, "num_bytes": 300, "num_trained_bytes": 100}
    assert least_memory(model) == 300 + 3 * 100


def cost(num_parameters=10_000_000, memory=(1, 2), disk=(1, 2)) -> Cost:
    model = nn.Linear(1, num_parameters, bias=False, device="meta")
    time = Time(0.5, 50.0, 7000.0, 0.0)
    return Cost(parameters_of(model), 100, time, Need(*memory, "GPU"), Need(*disk, "disk"), False)


def test_how_it_is_said():
    lines = dict(cost(memory=(3_210_000_000, 80_000_000_000)).lines())
    assert lines["time"] == "about 2.0 h: training 50 s, scouting at most 1.9 h"
    assert lines["steps"] == "100 of 0.5 s" and lines["memory"] == "3.2 GB of 80.0 GB on the GPU"
    assert [duration(seconds) for seconds in (0.04, 42, 200, 40_000)] == ["0.0 s", "42 s", "3 min", "11.1 h"]
    assert [size(number) for number in (1, 41_200_000, 2_000_000_000)] == ["1 MB", "42 MB", "2.0 GB"]


@pytest.mark.parametrize(
    ("learning_rate", "num_parameters", "is_adapter", "text"),
    [
        (2e-5, 600_000_000, False, None),
        (1e-3, 600_000_000, False, "high for a model of this size"),
        (1e-3, 300_000, False, None),
        (2e-5, 600_000_000, True, "low for an adapter"),
        (2e-4, 600_000_000, True, None),
        (1e-9, 300_000, False, "low for a model of this size"),
    ],
)
def test_unusual_learning_rates(learning_rate, num_parameters, is_adapter, text):
    args = BilevelConfig(bf16=False, learning_rate=learning_rate)
    lines = advice.on_settings(args, cost(num_parameters), is_adapter)
    assert len(lines) == (text is not None)
    assert text is None or (text in lines[0] and "`learning_rate`" in lines[0])


def test_what_does_not_fit():
    args = BilevelConfig(bf16=False)
    (line,) = advice.on_settings(args, cost(memory=(20_000_000_000, 8_000_000_000)), False)
    assert "needs 20.0 GB of memory, and the GPU has 8.0 GB free" in line and "`per_device_train_batch_size`" in line
    (line,) = advice.on_disk("run", cost(disk=(20_000_000_000, 8_000_000_000)))
    assert "writes 20.0 GB, and the disk of run has 8.0 GB free" in line and "`save_total_limit`" in line
    assert advice.on_disk("run", cost()) == [] == advice.on_disk("run", None)


@pytest.mark.parametrize(("num_rows", "num_lines"), [(3, 1), (31, 1), (32, 0)])
def test_few_trusted_rows(num_rows, num_lines):
    assert len(advice.on_number(num_rows)) == num_lines
