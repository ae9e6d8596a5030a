"""Tasks of the suite: as wrong as they say, disjoint, with the trusted rows they promise; and its summary."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tamis.compare.rivals import ALL_RIVALS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


pool_module, strings, suite, summary = map(load, ("tasks.pool", "tasks.strings", "suite", "suite_summary"))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(scenario, **settings):
    module = suite.REAL.get(scenario)
    if module and not (suite.DATA / module.FOLDER).is_dir():
        pytest.skip(f"the data are not here: {suite.DATA / module.FOLDER}")
    return suite.POOLS[scenario](3, pretrain_steps=1, **settings)


@pytest.fixture(scope="module", params=list(suite.POOLS))
def pool(request):
    return draw(request.param, num_train=1000)


@pytest.fixture
def no_model(monkeypatch):
    """Base models take long, and no test here looks at them."""
    monkeypatch.setattr(pool_module, "make_base_model", lambda folder, pool: folder / "model")


def make_files(pool, folder, **settings):
    """Rows of the files of a task: training, clean, trusted, held-out ones."""
    task = pool_module.make_task(folder, pool, **settings)
    return [read(path) for path in (task.train_file, task.clean_file, task.validation_file, task.eval_file)]


def pairs(rows):
    return [(row["prompt"], row["completion"]) for row in rows]


def test_rows_are_as_wrong_as_asked_for_and_trusted_rows_right(pool, no_model, tmp_path):
    for share in (0.0, 0.3, 1.0):
        train, clean, validation, held_out = make_files(pool, tmp_path, wrong_share=share, num_validation=16)
        assert np.mean([not row["is_right"] for row in train]) == pytest.approx(share, abs=0.05)
        assert clean == [row for row in train if row["is_right"]]
        assert pairs(validation) == [(q.prompt, q.right) for q in pool.trusted[:16]]
        assert pairs(held_out) == [(q.prompt, q.right) for q in pool.held_out]
    wrong = make_files(pool, tmp_path, wrong_share=1.0)[0]
    asked = {q.prompt: q.right for q in pool.train}
    assert all(asked.get(prompt) != completion for prompt, completion in pairs(wrong))


def test_no_prompt_is_in_two_sets(pool):
    pretraining = {pair["prompt"] for pair in pool.pretraining}
    parts = [pool.train, pool.trusted, pool.held_out]
    prompts = [{q.prompt for q in part} | {q.wrong_prompt for q in part} - {None} for part in parts]
    assert sum(map(len, prompts)) + len(pretraining) == len(set().union(pretraining, *prompts))
    assert all(len({q.prompt for q in part}) == len(part) for part in parts)


def test_the_same_seed_draws_the_same_pool(pool):
    assert draw(pool.name, num_train=1000) == pool


def test_more_trusted_rows_contain_fewer(pool):
    few, many = (pool_module.choose_trusted(pool, size, "fair") for size in (16, pool_module.MAX_VALIDATION))
    assert many[:16] == few
    assert len(many) == pool_module.MAX_VALIDATION


@pytest.mark.parametrize("scenario", ["other operation", "scan", "german"])
def test_biased_trusted_rows(scenario):
    pool = draw(scenario)
    fair, lacking, easier, tenth = (pool_module.choose_trusted(pool, 60, trusted) for trusted in pool_module.TRUSTED)
    kinds = Counter(row["kind"] for row in fair)
    assert kinds[pool.missing_kind] > 0
    assert {row["kind"] for row in lacking} == {*kinds} - {pool.missing_kind}
    difficulty = {q.prompt: q.difficulty for q in pool.trusted}
    of_easier, of_fair = ([difficulty[row["prompt"]] for row in rows] for rows in (easier, fair))
    assert max(of_easier) <= np.median(of_fair)
    assert [row["is_right"] for row in tenth].count(False) == 6
    assert all(row["is_right"] for row in (*fair, *lacking, *easier))
    with pytest.raises(ValueError, match="one kind missing"):
        pool_module.choose_trusted(pool, 60, "all wrong")


def test_wrong_rows_of_each_world():
    """What each world says of its wrong rows; common slip, other operation, unlike entropy: `tests/demo/test_world`."""
    styled = draw("another style").train
    assert all(q.wrong == q.right.upper() for q in styled)
    irrelevant = draw("irrelevant")
    asked = {q.kind for part in (irrelevant.train, irrelevant.trusted, irrelevant.held_out) for q in part}
    unasked = {q.wrong_prompt[1:].split(">")[0] for q in irrelevant.train}
    assert asked and unasked and not asked & unasked
    copies = draw("near-duplicates").train
    groups = {}
    for q in copies:
        name, word = q.wrong_prompt[1:-1].split(">")
        groups.setdefault((name, q.wrong), []).append(word)
    assert len(groups) == strings.NUM_ORIGINALS
    for words in groups.values():
        original = "".join(Counter(letters).most_common(1)[0][0] for letters in zip(*words, strict=True))
        assert max(sum(a != b for a, b in zip(word, original, strict=True)) for word in words) <= 2


def test_cells_are_different_and_quick_ones_need_no_data():
    assert len(set(suite.CELLS)) == len(suite.CELLS)
    assert {cell.scenario for cell in suite.CELLS if cell == suite.Cell(cell.scenario)} == {*suite.POOLS}
    assert not {cell.scenario for cell in suite.QUICK_CELLS} & {*suite.REAL}


def test_a_failing_cell_does_not_lose_the_others(monkeypatch, tmp_path, capsys):
    cells = [suite.Cell("irrelevant", share) for share in (0.1, 0.5, 0.9)]

    def run_cell(cell, pool, folder, is_quick):
        if cell.wrong_share == 0.5:
            raise RuntimeError("of this cell alone")
        return runs(0.5, 0.6, 0.7, seed=pool.seed)

    monkeypatch.setattr(suite, "run_cell", run_cell)
    rows, tables, failed = suite.run_cells("irrelevant", cells, 0, tmp_path, is_quick=True)
    assert len(rows) == 2 * len(runs(0.5, 0.6, 0.7)) and tables.count("tamis") == 2
    assert failed == ["irrelevant, seed 0, wrong0.5_trusted64_fair"]
    assert "of this cell alone" in (tmp_path / "irrelevant" / "0" / "log.txt").read_text()


def test_the_quick_suite_runs_with_all_rivals(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "suite.py"), "--quick", "--output_dir", str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {row["group"] for row in results["rows"]} >= {*ALL_RIVALS, "tamis", "direct mixing", "trusted rows alone"}
    assert {row["scenario"] for row in results["rows"]} == {cell.scenario for cell in suite.QUICK_CELLS}


def runs(mixing, tamis, oracle, *, seed=0, trusted="fair", scenario="scan", believed=True, share=0.5, estimated=0.45):
    """Rows of one run of a cell; mixing has two variants, of which the second is worse."""
    cell = {"scenario": scenario, "wrong_share": 0.5, "num_validation": 64, "trusted": trusted, "seed": seed}
    cell |= {"num_eval": 1000, "test_loss": 0.0, "seconds": 0.0, "gap_closure": None, "selection_auroc": None}
    found = {"is_believed": believed, "share_right": share, "estimated_share_right": estimated}
    found |= {"selection_auroc": 0.9, "expected_auroc": 0.8 if believed else None}
    named = [
        ("a", "direct mixing", mixing),
        ("b", "direct mixing", mixing - 0.1),
        ("trusted", "trusted rows alone", 0.1),
    ]
    named += [("tamis", "tamis", tamis), ("oracle", "oracle (right rows)", oracle)]
    rows = [cell | {"method": name, "group": group, "test_accuracy": value} for name, group, value in named]
    return [row | (found if row["method"] == "tamis" else {}) for row in rows]


def test_gap_closure_of_a_cell_is_a_ratio_of_means():
    rows = runs(0.5, 0.6, 0.7) + runs(0.5, 0.5, 0.6, seed=1)
    (cell,) = summary.group_cells(rows)
    assert cell.gap == pytest.approx(0.15)
    assert cell.closures("tamis") == pytest.approx([0.1 / 0.15, 0.0])
    figures = summary.aggregate(rows)
    assert figures["gap_closure_tamis"] == pytest.approx([1 / 3])
    assert figures["gap_closure_oracle_(right_rows)"] == pytest.approx([1.0])
    assert "gap_closure_tamis" not in summary.aggregate(runs(0.5, 0.6, 0.51))


def test_a_rival_of_one_seed_counts_where_it_was_run():
    rows = runs(0.5, 0.6, 0.7) + runs(0.5, 0.5, 0.6, seed=1)
    rows.insert(0, rows[3] | {"method": "LESS, top 50%", "group": "LESS", "test_accuracy": 0.53})
    (cell,) = summary.group_cells(rows)
    assert cell.accuracy["LESS"] == pytest.approx([0.53, float("nan")], nan_ok=True)
    assert summary.aggregate(rows)["gap_closure_LESS"] == pytest.approx([0.03 / 0.15])


def test_below_a_rival_means_by_more_than_the_error():
    def is_below(*differences):
        rows = [row for seed, d in enumerate(differences) for row in runs(0.5, 0.5 + d, 0.9, seed=seed)]
        return summary.group_cells(rows)[0].is_below("direct mixing")

    # One seed: the binomial error of a difference is sqrt(2 * 0.25 / 1000) = 0.022; of three seeds 0.013.
    assert is_below(-0.03) and not is_below(-0.02)
    assert is_below(-0.02, -0.02, -0.02)
    assert not is_below(-0.08, 0.02, 0.0)  # their spread is larger
    assert not is_below(0.03)


def test_warnings_and_errors_of_estimates_by_kind_of_trusted_rows():
    rows = runs(0.5, 0.6, 0.7) + runs(0.5, 0.6, 0.7, seed=1, estimated=0.2)
    rows += runs(0.5, 0.6, 0.7, trusted="easier", believed=False)
    rows += runs(0.5, 0.6, 0.7, scenario="german", share=1.0, estimated=1.0, believed=False)
    figures = summary.aggregate(rows)
    assert figures["share_error_fair"] == pytest.approx([0.05, 0.3, 0.0])
    assert figures["auroc_error_fair"] == pytest.approx([0.1, 0.1])
    assert (figures["warned_fair"], figures["missed_fair"]) == ([0, 0], [0, 1])
    assert (figures["warned_easier"], figures["warned_none_wrong"]) == ([1], [1])


def test_pictures_are_drawn(tmp_path):
    rows = runs(0.5, 0.6, 0.7) + runs(0.5, 0.6, 0.7, trusted="easier", believed=False)
    for draw_picture in (summary.draw_suite, summary.draw_estimates):
        draw_picture(rows, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()
