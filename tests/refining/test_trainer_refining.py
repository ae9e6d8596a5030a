"""Refining in whole runs: what a step trains on, how much each row counts, what is written down."""

import copy
import dataclasses
import logging
import math

import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    GradientRecorder,
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
    two_kinds,
    weighted_step,
    worth,
)
from scripted import letters

from tamis.recorder import FORMAT_VERSION
from tamis.stream import as_row

TRAIN, TRUSTED = pairs(7) + pairs(5, 50, wrong=True), pairs(4, 95)
RIGHT, WRONG, LIKE_RIGHT = two_kinds("xy")
# A scout tells them apart: p_right is 1 or 0.15. Between the ranks of twelve rows there is room for doubt.
KINDS = [*RIGHT[:6], *WRONG[:6]]
REFINING = {"refine_fraction": 0.5, "refine_start": 0, "refine_every": 2, "num_generations": 3, "max_new_tokens": 5}


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
            row = as_row(token_ids(train[i]["prompt"]), list(responses[j].token_ids))
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
            selector="mirror",
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
        trainer = bilevel(TRAIN, TRUSTED, selector="mirror", max_steps=4, **settings)
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
        selector="mirror",
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
                assert row == [*prompt, *batch["refined"][i].responses[chosen].token_ids] and row[len(prompt)] == letter
            else:
                assert chosen == -1 and row == prompt + token_ids(TRAIN[i]["completion"] + ".")
        assert rows.num_tokens_B[: rows.num_training].tolist() == num_tokens
        assert {tuple(row) for row in validation} == trusted
    assert sum(num_refined[::2]) >= 3 and sum(num_refined) == 12, "half of the rows of two epochs"


def test_completions_follow_the_model(bilevel, talkative_model, generated):
    """The generator is the model in training: what it writes after some steps is not what it wrote before."""
    settings = REFINING | {"selector": "mirror", "max_steps": 4, "learning_rate": 3e-2}
    trainer = bilevel(TRAIN, TRUSTED, model=talkative_model, **settings)
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
        {"peft_config": True, "scout_epochs": 20, "scout_learning_rate": 3e-2},
        {"refine_fraction": "auto"},
        {"rho": 0.3, "refine_policy": "random"},
        {"selector": "mirror", "reference": "zero"},
        {"selector": "mirror", "reference": "base", "peft_config": True, "loss_reduction": "token"},
        {"selector": "mirror", "reference": "tracked"},
        {"selector": "bmo"},
        {"selector": "bmo", "response_weighting": "uniform"},
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
    settings = REFINING | {"max_steps": 3, "refine_every": 2, "learning_rate": 1e-3} | settings
    peft_config = lora(lora_dropout=0.2) if settings.pop("peft_config", False) else None
    train = [row | {"weight": float(i)} for i, row in enumerate(KINDS)]
    trainer = bilevel(train, LIKE_RIGHT, model=talkative_model, peft_config=peft_config, **settings)
    before = parameters(trainer.model)
    trainer.train()
    num_rows = 6 if settings["refine_fraction"] == "auto" else round(settings["refine_fraction"] * 12)
    assert generated == ([num_rows] * 2 if num_rows else []), "nothing is asked of the generator for no rows"
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
    trainer = bilevel(TRAIN, TRUSTED, selector="mirror", max_steps=3, learning_rate=0.0, **REFINING)
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
        selector="mirror",
        max_steps=6,
        learning_rate=1e-2,
        **REFINING,
    )
    original = {
        row["example_id"]: plain_loss(trainer.model, row["input_ids"], row["labels"]).item()
        for row in trainer.train_dataset
    }
    base = tiny_model(tiny_tokenizer())
    trainer.train()
    measured = trainer.weighting.reference.loss_N
    assert 0 < measured.isnan().sum() < 12, "those that were refined from the start have not been measured"
    for i, loss in enumerate(measured.tolist()):
        assert math.isnan(loss) or loss == pytest.approx(original[i], abs=1e-5)
    for i, refined in trainer.weighting.refiner.buffer.rows.items():
        for response in refined.responses:
            row = as_row(token_ids(TRAIN[i]["prompt"]), list(response.token_ids))
            assert response.reference_loss == pytest.approx(plain_loss(base, **row).item(), abs=1e-5)


def test_scores_of_original_responses_stay_those_that_the_scout_gave(bilevel, script, tmp_path):
    script(lambda prompt, j, call: "x" * (1 + j) + ".")
    trainer = bilevel(KINDS, LIKE_RIGHT, max_steps=4, learning_rate=1e-2, **REFINING)
    row_weights, scores = trainer.weighting.row_weights, []
    settle = row_weights.settle
    row_weights.settle = lambda *found: settle(*found) or scores.append(row_weights.all_scores())
    trainer.train()
    table = pq.read_table(tmp_path / "run" / "weights.parquet").to_pydict()
    assert len(scores) == 1 and table["score"] == scores[0].tolist()
    assert table["refined"] == [False] * 6 + [True] * 6, "the wrong rows"
    assert table["p_right"] == pytest.approx(torch.sigmoid(scores[0]).tolist(), abs=1e-6)
    assert table["kept"] == [True] * 6 + [False] * 6
    responses = trainer.weighting.refiner.buffer.rows
    for record in pq.read_table(tmp_path / "run" / "refinements.parquet").to_pylist()[-6:]:
        known = [response.p_right for response in responses[record["example_id"]].responses]
        assert record["response_p_right"] == pytest.approx(known)
    weights = worth(torch.sigmoid(scores[0]))
    assert table["weight"] == pytest.approx((weights / weights.mean()).tolist(), abs=1e-5)
    assert sum(table["weight"][6:]) / sum(table["weight"]) < 0.03
    assert not torch.equal(row_weights.all_scores(), scores[0]), "the new responses have scores of their own"


# --- scouted responses ------------------------------------------------------------------------------------------------


def answers_of_both_kinds(prompt: str, j: int, call: int) -> str:
    """The scout finds the first completion right and the others wrong; from the second call on all are right."""
    return ("x" if j == 0 or call > 1 else "y") * 2 + "."


def test_responses_are_visited_as_often_as_they_are_right(bilevel, script, tmp_path):
    """By the scout, which is called back whatever has become of the model since."""
    script(answers_of_both_kinds)
    trainer = bilevel(KINDS, LIKE_RIGHT, max_steps=4, learning_rate=1e-2, **REFINING)
    row_weights, before_step, visits, useful = trainer.weighting.row_weights, trainer.weighting.before_step, [], []

    def spy(step, batches):
        batches = before_step(step, batches)
        visits.append(row_weights.visits_N().clone())
        useful.append(row_weights.num_useful())
        return batches

    trainer.weighting.before_step = spy
    seen = spy_on_steps(trainer)
    trainer.train()
    for step, batch in enumerate(seen):
        for i, refined in batch["refined"].items():
            right = [r.p_right for r in refined.responses if list(r.token_ids) == token_ids("xx.")]
            wrong = [r.p_right for r in refined.responses if list(r.token_ids) == token_ids("yy.")]
            assert min(right) > 0.9 and max(wrong, default=0) < 0.2 and len(right) == (1 if step < 2 else 3)
            assert i >= 6 and len(batch["refined"]) == 6
    assert torch.equal(visits[0], visits[1]) and torch.equal(visits[2], visits[3])
    assert (visits[0][6:] < 0.7).all() and (visits[2][6:] > 0.9).all(), "one of three, then all of them"
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in line]
    assert [line["rho"] for line in lines] == pytest.approx([12 / (12 + n) for n in useful], abs=1e-6)
    assert useful[2] > 10 > useful[0]
    first, *_ = pq.read_table(tmp_path / "run" / "refinements.parquet").to_pylist()
    assert first["response_p_right"][0] > 0.9 and max(first["response_p_right"][1:]) < 0.2


def test_the_visits_of_a_refresh_count_from_the_next_step_on(bilevel, script):
    """The rows of the step itself have been drawn already."""
    script(lambda prompt, j, call: "xx.")
    trainer = bilevel(KINDS, LIKE_RIGHT, max_steps=3, **REFINING | {"refine_start": 1, "refine_every": 9})
    seen = spy_on_steps(trainer)
    trainer.train()
    ids = [batch["rows"].training_ids for batch in seen]
    assert sum(i >= 6 for i in ids[0] + ids[1]) <= 1, "a wrong row is hardly visited"
    assert sum(i >= 6 for i in ids[2]) >= 2 and seen[2]["refined"].keys() == set(range(6, 12))


def test_auto_refines_the_rows_that_are_rather_wrong(bilevel, script, tmp_path):
    script()
    rows = [*RIGHT[:8], *WRONG[:4]]
    trainer = bilevel(rows, LIKE_RIGHT, max_steps=3, **REFINING | {"refine_fraction": "auto"})
    trainer.train()
    kept = pq.read_table(tmp_path / "run" / "weights.parquet")["kept"].to_pylist()
    assert not any(kept[8:]) and sum(kept[:8]) >= 6
    assert list(trainer.weighting.refiner.buffer.rows) == [i for i in range(12) if not kept[i]]


def test_a_scout_that_is_not_believed_refines_nothing(bilevel, script, caplog):
    """All weights are one: there is no lowest, and the first rows of the file are no worse than the others."""
    generator = script()
    with caplog.at_level(logging.WARNING):
        trainer = bilevel([*RIGHT, *LIKE_RIGHT[:6]], LIKE_RIGHT[6:], max_steps=8, **REFINING)
        trainer.train()
    assert not trainer.weighting.scouting.scout.finding.calibration.is_believed and "no row is refined" in caplog.text
    assert generator.num_calls == 0 and not trainer.weighting.refiner.buffer.rows
    assert trainer.weighting.row_weights.all_weights().tolist() == [1.0] * 18


def test_trusted_rows_are_the_same_where_some_were_left_out(bilevel, script):
    """Their ids are places in the user's data, of which the prepared rows may be fewer."""
    script()
    too_long = {"prompt": "x" * 60, "completion": "a"}
    expected = sorted(token_ids(row["prompt"] + row["completion"] + ".") for row in TRUSTED)
    for trusted in (TRUSTED, [too_long, *TRUSTED, too_long]):
        trainer = bilevel(TRAIN, trusted, selector="mirror", max_steps=2, max_length=40, **REFINING)
        seen = spy_on_steps(trainer)
        trainer.train()
        assert len(seen) == 2
        for batch in seen:
            assert sorted(batch["token_ids"][batch["rows"].num_training :]) == expected


# --- what is written down ---------------------------------------------------------------------------------------------


def test_weights_are_those_of_original_responses(bilevel, script, tmp_path):
    script()
    settings = REFINING | {"refine_start": 3, "refine_policy": "random", "max_steps": 6, "learning_rate": 1e-2}
    trainer = bilevel(TRAIN, TRUSTED, selector="mirror", **settings)
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
    bilevel(rows, TRUSTED if form == "text" else chat(TRUSTED), selector="mirror", **settings).train()
    table = pq.read_table(tmp_path / "run" / "refinements.parquet")
    assert table.schema.metadata[b"tamis_format_version"] == str(FORMAT_VERSION).encode()
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
        assert record["response_p_right"] == [None] * 5, "there is no scout"
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
    bilevel(TRAIN, TRUSTED, selector="mirror", max_steps=1, **REFINING).train()
    names = {row["example_id"]: row for row in pq.read_table(tmp_path / "run" / "weights.parquet").to_pylist()}
    for record in refinements(tmp_path / "run"):
        assert (record["source"], record["row"]) == tuple(names[record["example_id"]][n] for n in ("source", "row"))


def test_a_new_run_in_an_old_folder_begins_a_new_file(bilevel, script, tmp_path):
    script()
    for start in (0, 1):
        settings = REFINING | {"refine_start": start, "selector": "mirror", "max_steps": 2}
        bilevel(TRAIN, TRUSTED, **settings).train()
        assert {record["step"] for record in refinements(tmp_path / "run")} == {start}
