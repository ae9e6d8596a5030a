"""What a run tells of how its model is asked: the row that is printed, the example that runs, the card's snippet."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_model, tiny_tokenizer, token_ids, write_jsonl
from datasets import Dataset

from tamis.cli import main
from tamis.inference import show_row

SETTINGS = """--selector none --rho 0 --max_steps 60 --learning_rate 2e-2 --per_device_train_batch_size 8 --use_cpu
    --bf16 false --report_to none --disable_tqdm true --logging_strategy no""".split()  # noqa: SIM905


def shown(input_ids, labels, capfd, **columns) -> str:
    rows = Dataset.from_list([{"input_ids": input_ids, "labels": labels, **columns}])
    show_row(SimpleNamespace(train_dataset=rows, processing_class=tiny_tokenizer()))
    output = capfd.readouterr()
    assert output.out == ""
    return output.err


def test_the_row_is_shown_with_what_is_trained_on(capfd):
    prompt, response = token_ids("a=\n"), token_ids("bc.")
    labels = [-100] * 3 + response
    assert shown(prompt + response, labels, capfd, source="a.jsonl", row=4) == (
        "first row (a.jsonl, row 4 (line 5); 6 tokens, 3 trained on, between ⟦ and ⟧):\na = \\n⟦b c <eos>⟧\n"
    )


def test_the_row_is_shown_in_colour_on_a_terminal(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(token_ids("ab."), [-100, *token_ids("b.")], capfd)
    assert "\x1b[1;32m⟦b <eos>⟧\x1b[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in shown(token_ids("ab."), [-100, *token_ids("b.")], capfd)


def test_a_long_row_is_shown_in_a_few_lines(capfd):
    text = shown(token_ids("a" * 5000 + "b"), [-100] * 5000 + token_ids("b"), capfd)
    assert len(text) < 600 and "more characters" in text and text.endswith("⟦b⟧\n") and text.count("\n") == 2


@pytest.fixture
def base_models(tmp_path):
    """The tiny model with and without its chat template."""
    tokenizer, folders = tiny_tokenizer(), {}
    for name in ("chat", "plain"):
        tokenizer.save_pretrained(tmp_path / name)
        tiny_model(tokenizer).save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
        tokenizer.chat_template = None
    return folders


def answer_of(file, capfd) -> str:
    """What a script prints, run in this process: it needs nothing but these libraries."""
    imported = re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(imported) <= {"pathlib", "sys", "torch", "transformers", "peft"}
    capfd.readouterr()
    runpy.run_path(str(file))
    return capfd.readouterr().out


LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "up_proj", "down_proj", "--lora_r", "16"]


@pytest.mark.parametrize(("template", "extra"), [("chat", []), ("plain", []), ("alpaca", []), ("chat", LORA)])
def test_the_example_and_the_card_ask_as_training_did(base_models, tmp_path, monkeypatch, capfd, template, extra):
    """The answer to x's is a, to y's it is b; no held-out row is as long as a training row."""
    train, held_out = (
        [{"question": letter * n, "answer": answer} for n in lengths for letter, answer in ("xa", "yb")]
        for lengths in (range(1, 20, 2), range(2, 20, 4))
    )
    monkeypatch.chdir(tmp_path)
    run, model = tmp_path / "run", Path(base_models["plain" if template == "alpaca" else template]).name
    files = ["--train_dataset", write_jsonl(tmp_path / "t.jsonl", train)]
    files += ["--eval_dataset", write_jsonl(tmp_path / "e.jsonl", held_out[1:]), "--output_dir", str(run)]
    arguments = ["train", "--model_name_or_path", model, *files, *SETTINGS, *extra]
    arguments += ["--prompt_template", "alpaca"] if template == "alpaca" else []
    assert main(arguments) == 0
    output = capfd.readouterr()
    assert output.err.count("first row (t.jsonl, row 0") == 1 and "⟦a <eos>⟧" in output.err

    monkeypatch.chdir("/")  # it runs from anywhere, with an adapter too
    found = answer_of(run / "inference_example.py", capfd)
    assert repr(found.strip()) in (run / "inference_example.py").read_text(encoding="utf-8"), "as the run"
    card = (run / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## Quick start\n\n```python\n(.*?)```", card, re.DOTALL)
    assert ("tokenizer(PROMPT" in code) == (template == "plain")

    assert str(tmp_path) not in card, "a card is published"
    monkeypatch.chdir(tmp_path)

    def answer(question: str) -> str:
        asked = re.sub(r"'What is the capital of France\?'|'Write a prompt.*'", repr(question), code)
        (tmp_path / "asked.py").write_text(asked, encoding="utf-8")
        return answer_of(tmp_path / "asked.py", capfd)

    assert answer("yy") == found, "the first held-out row"
    if template != "alpaca" and not extra:  # neither is learned by a model that is so small and knows nothing
        assert "before, 1.000 after" in output.out
        assert (found, answer("x" * 6)) == ("b\n", "a\n"), "the held-out answers"
    assert f"fine-tuned version of the local model `{model}`" in card and "[None]" not in card
    section = card.split("## Prompt template")[1].split("## Training procedure")[0]
    expected = {"chat": "add_generation_prompt", "alpaca": "### Response:", "plain": "the text as it is"}
    assert expected[template] in section


def test_an_answer_that_ends_with_a_token_of_the_template_stops_there(base_models, tmp_path, capfd):
    """A template of a base model may end its turns with another token than the tokenizer's closing one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [">"]})
    tokenizer.save_pretrained(base_models["plain"])
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}>{% endfor %}")
    train = write_jsonl(tmp_path / "t.jsonl", [{"question": f"{i}?", "answer": "a"} for i in range(16)])
    arguments = ["train", "--model_name_or_path", base_models["plain"], "--train_dataset", train, *SETTINGS]
    run = tmp_path / "run"
    assert main([*arguments, "--output_dir", str(run), "--prompt_template", str(tmp_path / "t.jinja")]) == 0
    assert answer_of(run / "inference_example.py", capfd) == "a\n"
