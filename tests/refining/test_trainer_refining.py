"""Refining in whole runs: what a step trains on, how much each row counts, resuming, failures, what is written down."""

import copy
import dataclasses
import logging
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    GradientRecorder,
    Kill,
    Killed,
    assert_close,
    lora,
    pairs,
    parameters,
    plain_loss,
    read_jsonl,
    row_gradients,
    tiny_model,
    tiny_tokenizer,
    token_ids,
    weighted_step,
)
from scripted import ScriptedGenerator

from tamis.recorder import last_complete_checkpoint
from tamis.refining.generation import GenerationError, SamplingSettings, TransformersGenerator
from tamis.stream import as_row

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
TRAIN, TRUSTED = pairs(7) + pairs(5, 50, wrong=True), pairs(4, 95)
REFINING = {"refine_fraction": 0.5, "refine_start": 0, "refine_every": 2, "num_generations": 3, "max_new_tokens": 5}


class Script:
    """Stands in for the generator of a trainer: completions by text, calls counted, failures where it is told to."""

    def __init__(self, completion, fails_at=0, error=None):
        self.completion, self.fails_at, self.error, self.num_calls = completion, fails_at, error, 0

    def make(self, model, accelerator, processing_class, args, batch_size):
        self.settings = SamplingSettings(args.generation_temperature, args.generation_top_p, args.max_new_tokens)

        def script(prompt, j):
            return token_ids(self.completion(processing_class.decode(prompt).replace(" ", ""), j, self.num_calls))

        self.scripted = ScriptedGenerator(model, script, self.settings, processing_class.eos_token_id)
        return self

    def generate(self, prompts, num_generations, seed):
        self.num_calls += 1
        if self.num_calls == self.fails_at and self.error:
            raise self.error
        completions = self.scripted.generate(prompts, num_generations, seed)
        return completions[:-1] if self.num_calls == self.fails_at else completions


def letters(prompt: str, j: int, call: int) -> str:
    """Of unlike length for each completion; the same at every call."""
    return "pqrst"[j] * (1 + (j + len(prompt)) % 3) + "."


@pytest.fixture
def script(monkeypatch):
    """Give all trainers that are made from now on these completions."""

    def use(completion=letters, **failure) -> Script:
        generator = Script(completion, **failure)
        monkeypatch.setattr("tamis.weighting.make_generator", generator.make)
        return generator

    return use


@pytest.fixture(scope="session")
def talkative_model(tmp_path_factory) -> str:
    """The tiny model with a head that is not flat; letters close its completions, so that most of them end."""
    path = tmp_path_factory.mktemp("talkative_model")
    model = tiny_model(TOKENIZER)
    model.lm_head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = [EOS, *token_ids("abcdefghijklmn")]
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.fixture
def generated(monkeypatch):
    """How many prompts each call of the real generator completed."""
    calls, generate = [], TransformersGenerator.generate

    def counted(self, prompts, num_generations, seed):
        calls.append(len(prompts))
        return generate(self, prompts, num_generations, seed)

    monkeypatch.setattr(TransformersGenerator, "generate", counted)
    return calls


def spy_on_steps(trainer) -> list[dict]:
    """What every micro-batch holds when its loss is computed, and which rows are refined at that time."""
    seen, compute_loss = [], trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        if "rows" in inputs:
            mask_BT = inputs["attention_mask"].bool()
            seen.append(
                {
                    "step": trainer.state.global_step,
                    "rows": inputs["rows"],
                    "token_ids": [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], mask_BT, strict=True)],
                    "refined": copy.deepcopy(trainer.weighting.refiner.buffer.rows),
                }
            )
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    return seen


# --- a step is what it says it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_every_generated_response_is_multiplied_by_its_coefficient(bilevel, script, reduction, accumulation):
    """Weight of the row, times the capped ratio between the model and the one that generated the response."""
    script()
    weights, tau, cap = [0.5, 2.0, 0.0, 1.0, 3.0, 1.5], 0.5, 1.5
    train = [row | {"weight": weight} for row, weight in zip(pairs(6, 8), weights, strict=True)]
    recorder = GradientRecorder()
    trainer = bilevel(
        train,
        pairs(4, 95),
        max_steps=1,
        max_grad_norm=0.0,
        response_temperature=tau,
        importance_ratio_cap=cap,
        callbacks=[recorder],
        **REFINING | weighted_step(reduction, accumulation),
    )
    refresh, when_drawn, chosen = trainer.weighting._refresh, {}, {}

    def refresh_and_age(refiner, step):
        """As if other weights had generated the responses."""
        refresh(refiner, step)
        for i, refined in refiner.buffer.rows.items():
            changed = [
                dataclasses.replace(r, generator_log_prob=r.generator_log_prob + change * len(r.token_ids))
                for change, r in zip([0.5, -0.1, -0.6], refined.responses, strict=True)
            ]
            refiner.buffer.rows[i] = dataclasses.replace(refined, responses=changed)
        when_drawn.update(copy.deepcopy(refiner.buffer.rows))
        chosen.update({i: refiner.buffer.choose(i, step) for i in when_drawn})

    trainer.weighting._refresh = refresh_and_age
    loss = trainer.train().training_loss
    assert sorted(when_drawn) == [0, 2, 3], "those with the lowest weights"

    rows, level, importance = [], [], []
    for row in trainer.train_dataset:
        i = row["example_id"]
        importance.append(weights[i] / (8 / 6))
        if i in when_drawn:
            responses, j = when_drawn[i].responses, chosen[i]
            row = as_row(token_ids(train[i]["prompt"]), responses[j].token_ids)
            present = -plain_loss(trainer.model, **row).item()
            before = responses[j].generator_log_prob / len(responses[j].token_ids)
            importance[-1] = min(math.exp((present - before) / tau), cap)  # a refined row's own weight is one
            assert abs(importance[-1] - 1) > 0.05
        rows.append(row)
        level.append(0.7)
    for row in trainer.validation_dataset:
        rows.append(row)
        level.append(0.3)
        importance.append(1.0)
    num_tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
    expected = {name: torch.zeros_like(gradient) for name, gradient in recorder.steps[0].items()}
    expected_loss = 0.0
    for k, row in enumerate(rows):
        of_level = [n for n, other in zip(num_tokens, level, strict=True) if other == level[k]]
        share = num_tokens[k] / sum(of_level) if reduction == "token" else 1 / len(of_level)
        for name, gradient in row_gradients(trainer.model, row).items():
            expected[name] += level[k] * share * importance[k] * gradient
        expected_loss += (
            level[k] * share * importance[k] * plain_loss(trainer.model, row["input_ids"], row["labels"]).item()
        )
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_close(recorder.steps[0], expected)
    assert trainer.weighting.refiner.buffer.rows == when_drawn, "a visit changes nothing"


def test_batch_times_accumulation_is_all_that_counts(bilevel, script):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        script()
        trainer = bilevel(
            pairs(8) + pairs(8, 50, wrong=True),
            pairs(8, 95),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2.0,
            scout_ratio=0.0,
            selector_learning_rate=0.5,
            **{"optim": "sgd", "learning_rate": 0.1} | REFINING,
        )
        trainer.train()
        runs.append(trainer)
    actual, expected = runs
    assert actual.state.global_step == expected.state.global_step == 4
    assert_close(parameters(actual.model), parameters(expected.model), atol=2e-6)
    actual, expected = actual.weighting, expected.weighting
    scores, expected_scores = actual.refiner.original_scores(), expected.refiner.original_scores()
    torch.testing.assert_close(scores, expected_scores, atol=1e-3, rtol=0)
    weights, expected_weights = actual.row_weights.all_weights(), expected.row_weights.all_weights()
    torch.testing.assert_close(weights, expected_weights, atol=1e-3, rtol=0)
    assert list(actual.refiner.buffer.rows) == list(expected.refiner.buffer.rows)
    for i, refined in actual.refiner.buffer.rows.items():
        for response, other in zip(refined.responses, expected.refiner.buffer.rows[i].responses, strict=True):
            assert response.token_ids == other.token_ids
            assert response.generator_log_prob == pytest.approx(other.generator_log_prob, abs=1e-4)


def training_forwards(trainer) -> list[int]:
    """Rows of every forward that keeps a graph."""
    rows = []

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            rows.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    return rows


def test_a_step_costs_what_it_costs_without_refining(bilevel, script):
    """One forward with each row once, however many responses it has."""
    script()
    counts = []
    for settings in ({}, REFINING | {"num_generations": 5, "refine_fraction": 1.0}):
        trainer = bilevel(TRAIN, TRUSTED, scout_ratio=0.0, max_steps=4, **settings)
        counts.append(training_forwards(trainer))
        trainer.train()
    assert counts[0] == counts[1] == [8] * 4
    assert all(len(refined.responses) == 5 for refined in trainer.weighting.refiner.buffer.rows.values())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_step_after_a_refresh_trains_on_the_new_responses(bilevel, script, num_workers):
    """Batches may be fetched ahead of the steps: none comes with responses of before the refresh."""
    generator = script(lambda prompt, j, call: "_uvwxyz"[call] + letters(prompt, j, call))
    trainer = bilevel(
        TRAIN,
        TRUSTED,
        scout_ratio=0.0,
        max_steps=6,
        dataloader_num_workers=num_workers,
        **{"dataloader_prefetch_factor": 2} if num_workers else {},
        **REFINING,
    )
    seen = spy_on_steps(trainer)
    trainer.train()
    assert generator.num_calls == 3 and [batch["step"] for batch in seen] == list(range(6))
    num_refined = [0] * 6
    trusted = {tuple(token_ids(row["prompt"] + row["completion"] + ".")) for row in TRUSTED}
    for batch in seen:
        letter, rows, num_tokens = token_ids("uvwxyz"[batch["step"] // 2])[0], batch["rows"], []
        training, validation = batch["token_ids"][: rows.num_training], batch["token_ids"][rows.num_training :]
        for i, chosen, row in zip(rows.training_ids, rows.responses_L.tolist(), training, strict=True):
            prompt = token_ids(TRAIN[i]["prompt"])
            num_tokens.append(len(row) - len(prompt))
            if i in batch["refined"]:
                num_refined[batch["step"]] += 1
                assert row == prompt + batch["refined"][i].responses[chosen].token_ids and row[len(prompt)] == letter
            else:
                assert chosen == -1 and row == prompt + token_ids(TRAIN[i]["completion"] + ".")
        assert rows.num_tokens_B[: rows.num_training].tolist() == num_tokens
        assert {tuple(row) for row in validation} == trusted
    assert sum(num_refined[::2]) >= 3 and sum(num_refined) == 12, "half of the rows of two epochs"


def test_completions_follow_the_model(bilevel, talkative_model, generated):
    """The generator is the model in training: what it writes after some steps is not what it wrote before."""
    trainer = bilevel(TRAIN, TRUSTED, model=talkative_model, max_steps=4, learning_rate=3e-2, **REFINING)
    reported, refresh = [], trainer.weighting._refresh

    def refresh_and_report(refiner, step):
        refresh(refiner, step)
        reported.append(copy.deepcopy(refiner.buffer.rows))

    trainer.weighting._refresh = refresh_and_report
    trainer.train()
    assert generated == [6, 6] and len(reported) == 2
    both = [(reported[0][i], reported[1][i]) for i in reported[0].keys() & reported[1].keys()]
    assert both and all(
        [r.token_ids for r in first.responses] != [r.token_ids for r in second.responses] for first, second in both
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"peft_config": True},
        {"scout_ratio": 0.0, "reference": "zero"},
        {"scout_ratio": 0.0, "reference": "base", "peft_config": True, "loss_reduction": "token"},
        {"scout_ratio": 0.0, "reference": "tracked"},
        {"reference": "zero"},
        {"selector": "bmo"},
        {"selector": "bmo", "scout_ratio": 0.5, "response_weighting": "uniform"},
        {"selector": "softmax", "ratio_level": "sequence"},
        {"selector": "sigmoid", "reference": "zero"},
        {"selector": "column"},
        {"selector": "none", "refine_policy": "random"},
        {"activation_checkpointing": True, "refine_fraction": 1.0},
        {"refine_fraction": 0.02},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()) or "default",
)
def test_every_selector_and_reference_can_refine(bilevel, talkative_model, generated, tmp_path, settings):
    settings = REFINING | {"max_steps": 3, "refine_every": 2, "learning_rate": 1e-2} | settings
    peft_config = lora(lora_dropout=0.2) if settings.pop("peft_config", False) else None
    train = [row | {"weight": float(i)} for i, row in enumerate(TRAIN)]
    trainer = bilevel(train, TRUSTED, model=talkative_model, peft_config=peft_config, **settings)
    before = parameters(trainer.model)
    trainer.train()
    num_rows = round(settings["refine_fraction"] * 12)
    assert generated == [num_rows] * 2
    assert trainer.model.training
    assert all(p.isfinite().all() for p in parameters(trainer.model).values())
    moved = [n for n, p in parameters(trainer.model).items() if not torch.equal(p, before[n])]
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert set(trained) <= set(moved) and (peft_config is None or all("lora" in name for name in moved))
    weights = trainer.weighting.row_weights.all_weights()
    assert weights.isfinite().all() and (weights >= 0).all()
    refined = trainer.weighting.refiner.buffer.rows
    assert len(refined) >= 0.6 * num_rows
    assert all(response.generator_log_prob < 0 for row in refined.values() for response in row.responses)
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [math.isfinite(line["loss"]) for line in lines] == [True] * 3
    assert [line.get("refine/num_rows") is not None for line in lines] == [True, False, True]
    assert all(("response_ess" in line) == ("response_coefficient" in line) for line in lines)
    assert lines[2]["refine/logprob_drift"] < 0.01


# --- excess losses of generated responses -----------------------------------------------------------------------------


def test_a_generated_response_is_compared_with_the_base_model_on_that_response(bilevel, script):
    """Nothing is learned (learning rate 0): no response, original or new, has an excess over the base model."""
    script()
    trainer = bilevel(TRAIN, TRUSTED, scout_ratio=0.0, max_steps=3, learning_rate=0.0, **REFINING)
    updates, update = [], trainer.weighting.row_weights.update

    def spy(ids, losses, excess):
        updates.append((ids, excess))
        update(ids, losses, excess)

    trainer.weighting.row_weights.update = spy
    trainer.train()
    assert sum(len(ids) for ids, _ in updates) == 12
    for _, excess in updates:
        assert excess.abs().max() < 1e-5


@pytest.mark.parametrize("is_lora", [False, True])
def test_reference_losses_of_original_responses_stay_theirs(bilevel, script, is_lora):
    script()
    trainer = bilevel(
        TRAIN,
        TRUSTED,
        peft_config=lora() if is_lora else None,
        scout_ratio=0.0,
        max_steps=6,
        learning_rate=1e-2,
        **REFINING,
    )
    original = {
        row["example_id"]: plain_loss(trainer.model, row["input_ids"], row["labels"]).item()
        for row in trainer.train_dataset
    }
    base = tiny_model(TOKENIZER)
    trainer.train()
    measured = trainer.weighting.reference.loss_N
    assert 0 < measured.isnan().sum() < 12, "those that were refined from the start have not been measured"
    for i, loss in enumerate(measured.tolist()):
        assert math.isnan(loss) or loss == pytest.approx(original[i], abs=1e-5)
    for i, refined in trainer.weighting.refiner.buffer.rows.items():
        for response in refined.responses:
            row = as_row(token_ids(TRAIN[i]["prompt"]), response.token_ids)
            assert response.reference_loss == pytest.approx(plain_loss(base, **row).item(), abs=1e-5)


def test_scores_of_original_responses_stay_those_that_the_scout_gave(bilevel, script, tmp_path):
    script()
    trainer = bilevel(TRAIN, TRUSTED, max_steps=4, learning_rate=1e-2, **REFINING)
    row_weights = trainer.weighting.row_weights
    scores, score_rows = [], row_weights.score_rows

    def spy(*losses):
        score_rows(*losses)
        scores.append(row_weights.all_scores())

    row_weights.score_rows = spy
    trainer.train()
    table = pq.read_table(tmp_path / "run" / "weights.parquet").to_pydict()
    assert len(scores) == 1 and table["score"] == scores[0].tolist() and sum(table["refined"]) == 6
    assert not torch.equal(row_weights.all_scores(), scores[0]), "the new responses have scores of their own"


def test_trusted_rows_are_the_same_where_some_were_left_out(bilevel, script):
    """Their ids are places in the user's data, of which the prepared rows may be fewer."""
    script()
    too_long = {"prompt": "x" * 60, "completion": "a"}
    expected = sorted(token_ids(row["prompt"] + row["completion"] + ".") for row in TRUSTED)
    for trusted in (TRUSTED, [too_long, *TRUSTED, too_long]):
        trainer = bilevel(TRAIN, trusted, max_steps=2, max_length=40, per_device_validation_batch_size=4, **REFINING)
        seen = spy_on_steps(trainer)
        trainer.train()
        assert len(seen) == 2
        for batch in seen:
            assert sorted(batch["token_ids"][batch["rows"].num_training :]) == expected


# --- what is written down ---------------------------------------------------------------------------------------------


def test_weights_are_those_of_original_responses(bilevel, script, tmp_path):
    script()
    settings = REFINING | {"refine_start": 3, "refine_policy": "random", "max_steps": 6, "learning_rate": 1e-2}
    trainer = bilevel(TRAIN, TRUSTED, scout_ratio=0.0, **settings)
    trainer.train()
    table = pq.read_table(tmp_path / "run" / "weights.parquet").to_pydict()
    weighting = trainer.weighting
    row_weights, refined = weighting.row_weights, weighting.refiner.buffer.rows
    assert [i for i, is_refined in enumerate(table["refined"]) if is_refined] == list(refined) and len(refined) == 6
    original = torch.tensor([row.original_score for row in refined.values()])
    assert [table["score"][i] for i in refined] == pytest.approx(original.tolist())
    expected = row_weights.weights_of(weighting.refiner.original_scores())
    assert table["weight"] == pytest.approx((expected / expected.mean()).tolist()), "mean one over original responses"
    others = [i for i in range(12) if i not in refined]
    assert [table["score"][i] for i in others] == row_weights.scores(torch.tensor(others)).tolist()
    committed = row_weights.scores(torch.tensor(list(refined)))
    assert original.std() > 0.1 and (committed - original).abs().min() > 1e-4, "the score it trains with is another"


STATUSES = {"": "empty", "uv.": "usable", "uvw": "unfinished", "x" * 20 + ".": "too long", "w.": "usable"}


def refinements(folder) -> list[dict]:
    return pq.read_table(folder / "refinements.parquet").to_pylist()


@pytest.mark.parametrize("form", ["text", "chat"])
def test_refinements_hold_prompts_responses_and_what_they_count(bilevel, script, tmp_path, form):
    script(lambda prompt, j, call: list(STATUSES)[j])
    rows = [row | {"source": "a.jsonl", "row": 10 + i} for i, row in enumerate(TRAIN)]
    if form == "chat":
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    settings = REFINING | {"num_generations": 5, "max_steps": 4, "max_length": {"text": 20, "chat": 36}[form]}
    bilevel(rows, TRUSTED if form == "text" else chat(TRUSTED), **settings).train()
    table = pq.read_table(tmp_path / "run" / "refinements.parquet")
    assert table.schema.metadata[b"tamis_format_version"] == b"2"
    records = table.to_pylist()
    assert [record["step"] for record in records] == [0] * 6 + [2] * 6
    final = pq.read_table(tmp_path / "run" / "weights.parquet").to_pylist()
    for record in records:
        i = record["example_id"]
        assert (record["source"], record["row"]) == ("a.jsonl", 10 + i)
        assert (record["prompt"], record["original"]) == (TRAIN[i]["prompt"], TRAIN[i]["completion"])
        assert record["token_ids"] == [token_ids(text) for text in STATUSES]
        assert [text.replace(" ", "") for text in record["responses"]] == [text.strip(".") for text in STATUSES]
        assert record["statuses"] == list(STATUSES.values())
        usable = [
            w for w, status in zip(record["response_weights"], record["statuses"], strict=True) if status == "usable"
        ]
        assert sum(usable) == pytest.approx(1) == pytest.approx(sum(record["response_weights"]))
        assert all(weight > 0 for weight in usable) and record["is_refined"]
        assert all(log_prob < 0 for log_prob in record["log_probs"][1:]) and record["log_probs"][0] == 0
    # Weights of a refresh are by its mean, those of the other table by the mean over original responses.
    ratios = [row["original_weight"] / final[row["example_id"]]["weight"] for row in records if row["step"] == 2]
    assert ratios == pytest.approx([ratios[0]] * 6, rel=1e-4)


def chat(rows: list[dict]) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]


def test_rows_are_named_as_in_the_weights(bilevel, script, tmp_path):
    """Rows given from Python have no file; the two tables must name them alike all the same."""
    script()
    bilevel(TRAIN, TRUSTED, max_steps=1, **REFINING).train()
    names = {row["example_id"]: row for row in pq.read_table(tmp_path / "run" / "weights.parquet").to_pylist()}
    for record in refinements(tmp_path / "run"):
        assert (record["source"], record["row"]) == tuple(names[record["example_id"]][n] for n in ("source", "row"))


def test_a_new_run_in_an_old_folder_begins_a_new_file(bilevel, script, tmp_path):
    script()
    for start in (0, 1):
        settings = REFINING | {"refine_start": start, "scout_ratio": 0.0, "max_steps": 2}
        bilevel(TRAIN, TRUSTED, **settings).train()
        assert {record["step"] for record in refinements(tmp_path / "run")} == {start}


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(bilevel, talkative_model, tmp_path):
    """Make a trainer with its own folder; killed in a step, it leaves the checkpoint of the step before."""

    def make(name, *, kill=None, **settings):
        settings = REFINING | {"max_steps": 6, "learning_rate": 1e-2, "output_dir": str(tmp_path / name)} | settings
        if settings.pop("peft_config", None):
            settings["peft_config"] = lora(lora_dropout=0.3)
        if kill:
            settings = {"save_strategy": "steps", "save_steps": kill - 1, "callbacks": [Kill(kill)]} | settings
        return bilevel(TRAIN, TRUSTED, model=talkative_model, **settings)

    return make


def timeless(folder) -> list[dict]:
    """Metrics without what the clock says."""
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "train_runtime" not in line]
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k} for line in lines]


def assert_same_state(actual, expected) -> None:
    first, second = actual.weighting.state_dict(), expected.weighting.state_dict()
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} >= {"row_weights", "refiner"}
    for name, tensor in first.items():
        assert torch.equal(tensor.nan_to_num(-1), second[name].nan_to_num(-1)), name


# Three steps make an epoch and two lie between refreshes: one is due at step 2, none at step 3.
RUNS = {
    "scouted": {},
    "scores follow the steps": {"scout_ratio": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "tracked, lora dropout": {"reference": "tracked", "peft_config": True},
    "scouted, lora dropout": {"peft_config": True},
}


STEPS = {"scouted": (3,), "scores follow the steps": (3,), "tracked, lora dropout": (2,)}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, generated, tmp_path, name):
    whole = run("whole", **RUNS[name])
    whole.train()
    assert generated == [6, 6, 6]
    for step in STEPS.get(name, (2, 3)):
        folder = f"cut-{step}"
        with pytest.raises(Killed):
            run(folder, kill=step + 1, **RUNS[name]).train()
        generated.clear()
        resumed = run(folder, **RUNS[name])
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert generated == [6] * {2: 2, 3: 1}[step], "nothing is generated again within an interval"
        assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
        assert_same_state(resumed, whole)
        for table in ("weights.parquet", "refinements.parquet"):
            assert pq.read_table(tmp_path / folder / table).equals(pq.read_table(tmp_path / "whole" / table)), table
        assert timeless(tmp_path / folder) == timeless(tmp_path / "whole")


def test_a_refresh_at_the_end_of_an_epoch(run, generated):
    settings = {"refine_every": 3, "peft_config": True, "scout_ratio": 0.0}
    whole = run("whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        run("cut", kill=4, **settings).train()
    generated.clear()
    resumed = run("cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert generated == [6]
    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
    assert_same_state(resumed, whole)


def test_refinements_of_steps_that_run_again_are_replaced(run, tmp_path):
    """Killed after the refreshes before steps 3 and 5; taken up from a checkpoint before either."""
    with pytest.raises(Killed):
        run("cut", kill=5, save_steps=1, scout_ratio=0.0).train()
    path = tmp_path / "cut" / "refinements.parquet"
    table = pq.read_table(path)
    assert table["step"].to_pylist() == [0] * 6 + [2] * 6 + [4] * 6
    marked = pa.array([-1.0] * 18)
    pq.write_table(table.set_column(table.schema.get_field_index("original_weight"), "original_weight", marked), path)
    run("cut", scout_ratio=0.0).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))
    again = pq.read_table(path)
    assert again["step"].to_pylist() == table["step"].to_pylist()
    assert [weight == -1 for weight in again["original_weight"].to_pylist()] == [True] * 6 + [False] * 12


@pytest.mark.parametrize("is_on_first", [True, False])
def test_refining_cannot_be_switched_on_resuming(run, is_on_first):
    """The scores of refined rows are those of their new responses: without these they would be wrong weights."""
    on, off = {"scout_ratio": 0.0}, {"scout_ratio": 0.0, "refine_fraction": 0.0}
    first, second = (on, off) if is_on_first else (off, on)
    with pytest.raises(Killed):
        run("cut", kill=3, **first).train()
    with pytest.raises(ValueError, match=r"refine_fraction: 0\.. -> 0\.."):
        run("cut", **second).train(resume_from_checkpoint=True)


def test_resuming_needs_the_scout(run, tmp_path):
    with pytest.raises(Killed):
        run("cut", kill=3).train()
    scout = tmp_path / "cut" / "scout.safetensors"
    assert scout.is_file()
    scout.unlink()
    with pytest.raises(ValueError, match=r"scout.safetensors is missing: .* start the run anew"):
        run("cut").train(resume_from_checkpoint=True)


def test_the_scout_goes_along_to_another_folder(run, tmp_path):
    with pytest.raises(Killed):
        run("first", kill=3).train()
    scout = (tmp_path / "first" / "scout.safetensors").read_bytes()
    with pytest.raises(Killed):
        run("second", kill=5).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert (tmp_path / "second" / "scout.safetensors").read_bytes() == scout
    resumed = run("second")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_a_scout_of_another_model_is_refused(run, tmp_path):
    full, adapter = run("full").weighting.scout, run("lora", peft_config=True).weighting.scout
    full.parameters = full.base_parameters
    full.save(tmp_path / "scout.safetensors")
    full.load(tmp_path / "scout.safetensors")
    assert_close(full.parameters, full.base_parameters, atol=0)
    with pytest.raises(ValueError, match=r"scout.safetensors belongs to another model"):
        adapter.load(tmp_path / "scout.safetensors")


def test_without_scouting_there_is_no_scout_to_keep(run, tmp_path):
    run("whole", scout_ratio=0.0, max_steps=1).train()
    assert not (tmp_path / "whole" / "scout.safetensors").exists()


# --- a generator that fails -------------------------------------------------------------------------------------------

FAILURES = {
    "its own error": GenerationError("the generator has no memory left"),
    "connection lost": ConnectionError("the server is gone"),
    "too few completions": None,
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_stops_with_a_checkpoint_and_a_remedy(bilevel, script, tmp_path, name):
    script(fails_at=2, error=FAILURES[name])
    trainer = bilevel(TRAIN, TRUSTED, max_steps=4, scout_ratio=0.0, **REFINING)
    remedies = (
        r"; --refine_on_error continue goes on without new responses\. "
        r"Stopped after saving checkpoint-2: go on with --resume_from_checkpoint last$"
    )
    with pytest.raises(GenerationError, match=remedies):
        trainer.train()
    assert trainer.state.global_step == 2
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(("fails_at", "step", "scout_ratio"), [(1, 0, 0.5), (2, 2, 0.0)])
def test_a_run_that_stopped_goes_on_as_if_nothing_had_happened(bilevel, script, tmp_path, fails_at, step, scout_ratio):
    script()
    settings = REFINING | {"max_steps": 4, "scout_ratio": scout_ratio}
    whole = bilevel(TRAIN, TRUSTED, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    script(fails_at=fails_at)
    stopped = bilevel(TRAIN, TRUSTED, **settings)
    with pytest.raises(GenerationError, match=f"checkpoint-{step}: go on with"):
        stopped.train()
    generator = script()
    resumed = bilevel(TRAIN, TRUSTED, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and generator.num_calls == 3 - fails_at
    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
    assert_same_state(resumed, whole)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_said_and_training_goes_on(bilevel, script, caplog, tmp_path, name):
    """With the responses there are, until the next refresh."""
    generator = script(
        lambda prompt, j, call: "_uvw"[call] + letters(prompt, j, call), fails_at=2, error=FAILURES[name]
    )
    trainer = bilevel(TRAIN, TRUSTED, max_steps=6, refine_on_error="continue", scout_ratio=0.0, **REFINING)
    seen = spy_on_steps(trainer)
    with caplog.at_level(logging.WARNING, logger="tamis"):
        trainer.train()
    warnings = [record.message for record in caplog.records if "no new responses" in record.message]
    assert len(warnings) == 1 and warnings[0].startswith("step 2: ")
    assert generator.num_calls == 3 and trainer.state.global_step == 6
    for batch in seen:
        assert len(batch["refined"]) == 6
        for refined in batch["refined"].values():
            assert refined.step == {0: 0, 1: 0, 2: 0, 3: 0, 4: 4, 5: 4}[batch["step"]]
    assert {record["step"] for record in refinements(tmp_path / "run")} == {0, 4}


def test_a_failure_at_the_first_refresh_leaves_the_original_responses(bilevel, script):
    script(fails_at=1)
    trainer = bilevel(TRAIN, TRUSTED, max_steps=2, refine_on_error="continue", scout_ratio=0.0, **REFINING)
    trainer.train()
    script()
    plain = bilevel(TRAIN, TRUSTED, max_steps=2, scout_ratio=0.0)
    plain.train()
    assert trainer.weighting.refiner.buffer.rows == {}
    assert_close(parameters(trainer.model), parameters(plain.model), atol=0)


def test_a_dataset_without_prompts_is_refused_when_the_trainer_is_made(bilevel, script):
    script()
    texts = [[{"text": row["prompt"] + row["completion"]} for row in rows] for rows in (TRAIN, TRUSTED)]
    with pytest.raises(ValueError, match="no training row is a prompt with one response"):
        bilevel(*texts, **REFINING)


def test_a_scout_that_is_not_believed_refines_nothing(bilevel, script, caplog):
    """All weights are one: there is no lowest, and the first rows of the file are no worse than the others."""
    generator = script()
    rows = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(20, 60)]
    with caplog.at_level(logging.WARNING):
        trainer = bilevel(rows[::2], rows[1::2], max_steps=8, scout_ratio=1.0, scout_learning_rate=1e-2, **REFINING)
        trainer.train()
    assert not trainer.weighting.scout.is_believed and "no row is refined" in caplog.text
    assert generator.num_calls == 0 and not trainer.weighting.refiner.buffer.rows
    assert trainer.weighting.row_weights.all_weights().tolist() == [1.0] * 20
