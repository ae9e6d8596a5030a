"""The prompt contract: nothing is added silently, responses alone are trained on, nothing of a row is dropped."""

import json
import logging

import pytest
from conftest import CHAT_TEMPLATE, PLAIN, message_of, pairs, tiny_model, tiny_tokenizer, token_ids, write_jsonl
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from tamis import BilevelConfig, BilevelTrainer, load_rows

MARKED = (  # as CHAT_TEMPLATE, and it says which tokens are the assistant's
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MIXING = {"selector": "none", "rho": 0.0}
NO_MODEL = "there/is-no-such-model"
TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the tiny model, by chat template: none, chat, marked."""
    folders = {}
    for name, template in {"none": None, "chat": CHAT_TEMPLATE, "marked": MARKED}.items():
        folder = tmp_path_factory.mktemp(name)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        tiny_model(tokenizer).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def trainer_of(models, tmp_path):
    """A trainer of rows that are read from a file, as the command line makes it."""

    def make(rows, model="chat", prompt_template="auto", validation=None, **settings):
        datasets = {"train_dataset": load_rows(write_jsonl(tmp_path / "train.jsonl", rows), role="train_dataset")}
        if validation is not None:
            path = write_jsonl(tmp_path / "validation.jsonl", validation)
            datasets["validation_dataset"] = load_rows(path, role="validation_dataset")
            settings = {"rho": 0.5} | settings
        args = BilevelConfig(
            **{"output_dir": str(tmp_path / "run")} | PLAIN | MIXING | {"overwrite_output_dir": True} | settings
        )
        return BilevelTrainer(models.get(model, model), args, **datasets, prompt_template=prompt_template)

    return make


def prepared(trainer) -> list[tuple[list[int], list[int]]]:
    return list(zip(trainer.train_dataset["input_ids"], trainer.train_dataset["labels"], strict=True))


def row(prompt: str, response: str) -> tuple[list[int], list[int]]:
    """A prepared row, by what is trained on and what is not; a dot is the closing token."""
    return token_ids(prompt + response), [-100] * len(token_ids(prompt)) + token_ids(response)


def text_of(trainer, i: int = 0) -> str:
    tokens = trainer.processing_class.convert_ids_to_tokens(trainer.train_dataset[i]["input_ids"])
    return "".join("." if token == "<eos>" else token for token in tokens)


# --- nothing is added silently ----------------------------------------------------------------------------------------

LAYOUTS = [
    {"prompt": "ab", "completion": "c"},
    {"question": "ab", "answer": "c"},
    {"instruction": "ab", "output": "c"},
    {"instruction": "ab", "input": "", "output": "c"},
]


@pytest.mark.parametrize("given", LAYOUTS, ids=lambda given: " ".join(given))
def test_rows_without_roles_go_through_the_chat_template_where_there_is_one(trainer_of, given):
    assert prepared(trainer_of([given])) == [row("<user>ab.<assistant>", "<assistant>c."[11:])]
    assert prepared(trainer_of([given], model="none")) == [row("ab", "c.")]
    assert prepared(trainer_of([given], prompt_template="plain")) == [row("ab", "c.")]


def test_named_columns_do_so_too(models, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"utterance": "ab", "intent": "c"}])
    rows = load_rows(path, role="train_dataset", prompt_column="utterance", response_column="intent")
    args = BilevelConfig(str(tmp_path), **PLAIN, **MIXING)
    trainer = BilevelTrainer(models["none"], args, train_dataset=rows, prompt_template="auto")
    assert prepared(trainer) == [row("ab", "c.")]


def test_python_rows_stay_as_they_are_without_a_template_as_in_trl(models, tmp_path):
    """The demo's and the benchmarks' rows, whose tokenizers have no chat template, come out so by either way."""
    rows = Dataset.from_list(pairs(6))
    args = BilevelConfig(str(tmp_path), **PLAIN, **MIXING)
    trl = SFTTrainer(models["chat"], SFTConfig(str(tmp_path), **PLAIN), train_dataset=rows)
    expected = list(zip(trl.train_dataset["input_ids"], trl.train_dataset["labels"], strict=True))
    assert prepared(BilevelTrainer(models["chat"], args, train_dataset=rows)) == expected
    assert prepared(BilevelTrainer(models["none"], args, train_dataset=rows, prompt_template="auto")) == expected


def test_an_input_follows_its_instruction_after_a_blank_line(trainer_of):
    given = [{"instruction": "ab", "input": "x", "output": "c"}, {"instruction": "d", "input": "", "output": "e"}]
    assert prepared(trainer_of(given, model="none")) == [row("ab\n\nx", "c."), row("d", "e.")]
    assert text_of(trainer_of(given)) == "<user>ab\n\nx.<assistant>c."


def test_alpaca_is_the_wording_of_alpaca(trainer_of):
    given = [{"instruction": "ab", "input": "x", "output": "c"}, {"instruction": "d", "output": "e"}]
    trainer = trainer_of(given, model="none", prompt_template="alpaca", max_length=1000)
    tokenizer = trainer.processing_class
    asks = [trainer._train_rows[i]["prompt"] for i in range(2)]
    with_input, alone = (tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) for ask in asks)
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nab\n\n### Input:\nx\n\n### Response:\n"
    )
    assert alone == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nd\n\n### Response:\n"
    )
    labels = trainer.train_dataset["labels"]
    assert [[label for label in row if label != -100] for row in labels] == [token_ids("c."), token_ids("e.")]


def test_alpaca_begins_as_the_tokenizer_begins_texts(tmp_path, models):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    args = BilevelConfig(str(tmp_path), **PLAIN, **MIXING)
    rows = Dataset.from_list(pairs(1))
    trainer = BilevelTrainer(
        models["none"], args, train_dataset=rows, prompt_template="alpaca", processing_class=tokenizer
    )
    ids = trainer.train_dataset[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id != ids[1]


def test_a_jinja_file_is_a_chat_template_and_is_saved_with_the_model(trainer_of, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}={% endfor %}")
    trainer = trainer_of(
        [{"question": "ab", "answer": "c"}], model="none", prompt_template=str(tmp_path / "mine.jinja")
    )
    assert prepared(trainer) == [row("ab=", "c=")]
    trainer.save_model()
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == (tmp_path / "mine.jinja").read_text()


def test_trls_own_setting_names_the_template_too(trainer_of, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}={% endfor %}")
    trainer = trainer_of(LAYOUTS[:1], model="none", chat_template_path=str(tmp_path / "mine.jinja"))
    assert prepared(trainer) == [row("ab=", "c=")]


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("alpacca", None, "prompt_template 'alpacca': there is no such template"),
        ("no.jinja", None, "there is no such file"),
        ("a.jinja", "{% for m in messages %}", "cannot write a conversation"),
        ("a.jinja", "{{ prompt }}", "does not write the messages"),
        ("chat", None, "the model has no chat template"),
    ],
)
def test_templates_that_cannot_work_are_refused_before_the_model_is_loaded(
    trainer_of, models, tmp_path, monkeypatch, template, text, expected
):
    def refuse(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", refuse)
    if text is not None:
        (tmp_path / template).write_text(text)
    name = str(tmp_path / template) if template.endswith("jinja") else template
    assert expected in message_of(lambda: trainer_of(LAYOUTS[:1], model="none", prompt_template=name))


def test_rows_are_checked_before_the_tokenizer_is_looked_for(trainer_of):
    rows = [{"messages": [user("a"), assistant("b", weight=0.5)]}]
    assert "row 0" in message_of(lambda: trainer_of(rows, model=NO_MODEL))


def test_what_has_been_settled_is_announced(trainer_of, caplog):
    assert "prompt_template = chat (the model has a chat template)" in trainer_of(LAYOUTS[:1]).resolved.announcements
    plain = trainer_of(LAYOUTS[:1], model="none").resolved
    assert "prompt_template = plain (the model has no chat template)" in plain.announcements
    with caplog.at_level(logging.WARNING):
        trainer_of([{"text": "ab"}], prompt_template="alpaca")
    assert "prompt_template is set but has no effect: texts and tokens are trained on as they are" in caplog.text


def test_a_run_is_not_resumed_with_another_template(trainer_of):
    rows = pairs(8)
    trainer_of(rows, max_steps=2, save_strategy="steps", save_steps=1).train()
    other = trainer_of(rows, prompt_template="plain", max_steps=2)
    assert "prompts: chat" in message_of(lambda: other.train(resume_from_checkpoint=True))


# --- responses alone are trained on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["chat", "marked"])
def test_two_layouts_of_the_same_rows_are_the_same_rows(trainer_of, model):
    two = [
        [{"messages": [user("ab"), assistant("c" * n)]} for n in range(1, 5)],
        [{"question": "ab", "answer": "c" * n} for n in range(1, 5)],
        [{"prompt": [user("ab")], "completion": [assistant("c" * n)]} for n in range(1, 5)],
        [{"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "c" * n}]} for n in range(1, 5)],
    ]
    found = [prepared(trainer_of(rows, model=model)) for rows in two]
    assert found[0] == [row("<user>ab.<assistant>", f"{'c' * n}.") for n in range(1, 5)]
    assert all(rows == found[0] for rows in found)


def test_they_get_the_same_weights(trainer_of):
    settings = {"selector": "mirror", "reference": "zero", "rho": 0.5, "max_steps": 4}
    texts, trusted = [(str(i), "ab"[i % 2] * (1 + i % 3)) for i in range(8)], [(str(90 + i), "a") for i in range(4)]

    def weights(write):
        rows, validation = ([write(*pair) for pair in part] for part in (texts, trusted))
        trainer = trainer_of(rows, validation=validation, **settings)
        trainer.train()
        return trainer.weighting.columns()["weight"].tolist()

    as_messages = weights(lambda question, answer: {"messages": [user(question), assistant(answer)]})
    assert as_messages == weights(lambda question, answer: {"question": question, "answer": answer})
    assert len(set(as_messages)) > 1


CONVERSATION = [user("a"), assistant("b"), user("c"), assistant("d")]


def test_every_answer_is_trained_on_where_the_template_marks_them(trainer_of):
    trainer = trainer_of([{"messages": CONVERSATION}, {"messages": CONVERSATION[:2]}], model="marked")
    first = trainer.train_dataset[0]
    trained = [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label != -100]
    assert trained == token_ids("b.d.")
    assert any("every answer is trained on" in line for line in trainer.resolved.announcements)


def test_the_last_answer_is_trained_on_where_the_template_does_not(trainer_of, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of([{"messages": CONVERSATION}])
    assert prepared(trainer) == [row("<user>a.<assistant>b.<user>c.<assistant>", "d.")]
    assert "1 rows have several answers, first train.jsonl, row 0 (line 1), and only the last one" in caplog.text


def test_all_tokens_are_trained_on_where_it_is_asked_for(trainer_of):
    ((ids, labels),) = prepared(trainer_of([{"messages": CONVERSATION}], assistant_only_loss=False))
    assert ids == labels


def test_mixed_layouts_are_refused(trainer_of):
    messages, plain = [{"messages": [user("a"), assistant("b")]}], [{"question": "a", "answer": "b"}]
    as_lists = [{"prompt": [user("c")], "completion": [assistant("d")]}]
    text = message_of(lambda: trainer_of(messages, validation=plain))
    assert text.startswith("train_dataset has messages, validation_dataset has prompt and completion: ")
    text = message_of(lambda: trainer_of(plain, validation=as_lists, model=NO_MODEL))
    assert "validation_dataset has prompt and completion as lists of messages" in text
    trainer_of(plain, validation=[{"instruction": "c", "output": "d"}])


# --- nothing of a row is dropped --------------------------------------------------------------------------------------


def test_system_and_history_are_turns_before_the_prompt(trainer_of):
    given = {"instruction": "a", "input": "x", "output": "b", "system": "s", "history": [["h", "i"], ["j", "k"]]}
    expected = "<system>s.<user>h.<assistant>i.<user>j.<assistant>k.<user>a\n\nx.<assistant>b."
    trainer = trainer_of([given, {"instruction": "c", "input": "", "output": "d", "system": "", "history": []}])
    assert [text_of(trainer, i) for i in range(2)] == [expected, "<user>c.<assistant>d."]
    assert prepared(trainer)[0][1][-2:] == token_ids("b.") and prepared(trainer)[0][1][-3] == -100


@pytest.mark.parametrize("content", [{"messages": [user("a"), assistant("b")]},
                                     {"prompt": [user("a")], "completion": [assistant("b")]}])  # fmt: skip
def test_a_column_system_is_the_first_of_the_messages(trainer_of, content):
    assert text_of(trainer_of([content | {"system": "s"}])) == "<system>s.<user>a.<assistant>b."
    name = next(iter(content))
    twice = {**content, name: [{"role": "system", "content": "t"}, *content[name]], "system": "s"}
    text = message_of(lambda: trainer_of([content, twice]))
    assert text.startswith("train.jsonl, row 1 (line 2): there is a system message and a column system.")


WITH_TOOLS = CHAT_TEMPLATE.replace("{% for m", "{% if tools %}{{ tools[0].function.name }}={% endif %}{% for m", 1)


def test_tools_are_trls(trainer_of, tmp_path):
    (tmp_path / "tools.jinja").write_text(WITH_TOOLS)
    for tools in ([TOOL], json.dumps([TOOL])):
        for rows in ({"question": "a", "answer": "b"}, {"messages": [user("a"), assistant("b")]}):
            trainer = trainer_of([rows | {"tools": tools}], prompt_template=str(tmp_path / "tools.jinja"))
            assert text_of(trainer) == "add=<user>a.<assistant>b."
    text = message_of(lambda: trainer_of([{"question": "a", "answer": "b", "tools": [TOOL]}]))
    assert text.startswith('train.jsonl, row 0 (line 1): column "tools": the chat template leaves tools out.')


@pytest.mark.parametrize(
    ("part", "value"), [("system", "s"), ("history", [["h", "i"]]), ("tools", [TOOL])], ids=lambda value: str(value)[:9]
)
def test_what_text_has_no_place_for_is_refused_by_name(trainer_of, models, tmp_path, part, value):
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b", part: value}]
    text = message_of(lambda: trainer_of(rows, model="none"))
    assert text.startswith(
        f'train.jsonl, row 1 (line 2), column "{part}": text has no place for it. Set prompt_template'
    )
    text = message_of(lambda: trainer_of([{"text": "a"}, {"text": "b", part: value}], model=NO_MODEL))
    assert text.startswith(f'train.jsonl, row 1 (line 2), column "{part}": a text is trained on as it is')
    in_python = Dataset.from_list([{"prompt": "a", "completion": "b", part: value}])
    args = BilevelConfig(str(tmp_path), **PLAIN, **MIXING)
    text = message_of(lambda: BilevelTrainer(models["chat"], args, train_dataset=in_python))
    assert text.startswith(f'train_dataset, row 0, column "{part}": text has no place for it.')


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"question": "a", "answer": "b", "system": 3}, 'column "system": the system 3 is not text.'),
        (
            {"question": "a", "answer": "b", "history": "h"},
            "column \"history\": 'h' is not a list of [user, assistant].",
        ),
        ({"question": "a", "answer": "b", "history": [["h"]]}, "is not a list of [user, assistant]."),
        ({"question": "a", "answer": "b", "tools": "no"}, "column \"tools\": 'no' is not a list of tools"),
        ({"messages": CONVERSATION, "history": [["h", "i"]]}, 'column "history": messages have no place for history'),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "message 1 has the weight 0.5, not 0 or 1."),
        ({"messages": [user("a") | {"train": True}, assistant("b")]}, "message 0 is to be trained on, and only the"),
        ({"messages": [user("a"), assistant("b", train=False)]}, "its train or weight fields leave out some answers"),
        ({"messages": [*CONVERSATION[:3], assistant("d", weight=0)]}, "its train or weight fields leave out some"),
        ({"prompt": [user("a"), assistant("b", weight=1)], "completion": [assistant("c")]}, "message 1 is to be"),
        ({"prompt": [user("a")], "completion": [assistant("c", train=False)]}, "leave out some answers"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, bad, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [bad])
    text = message_of(lambda: load_rows(path, role="train_dataset"))
    assert text.startswith("a.jsonl, row 0 (line 1), column ") and expected in text


@pytest.mark.parametrize("name", ["train", "weight"])
@pytest.mark.parametrize("model", ["chat", "marked"])
def test_training_flags_of_messages(trainer_of, name, model):
    first, last = assistant("b", **{name: 0}), assistant("d", **{name: 1})
    rows = [{"messages": [user("a"), first, user("c"), last]}, {"messages": [user("a"), assistant("b")]}]
    expected = [row("<user>a.<assistant>b.<user>c.<assistant>", "d."), row("<user>a.<assistant>", "b.")]
    assert prepared(trainer_of(rows, model=model)) == expected
    text = message_of(lambda: trainer_of(rows, model=model, assistant_only_loss=model == "marked"))
    assert text.startswith("train.jsonl, row 0 (line 1) trains on its last answer alone, by train or weight, and the")
    text = message_of(lambda: trainer_of([{"messages": CONVERSATION}, *rows], model=model))
    assert text.startswith("train.jsonl, row 0 (line 1) trains on several answers, train.jsonl, row 1 (line 2) on its")


@pytest.mark.parametrize(
    ("template", "rows", "expected"),
    [
        (CHAT_TEMPLATE + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
         [{"role": "system", "content": "s"}, user("a"), assistant("b")], "cannot write it (no system)"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}={% endfor %}",
         [{"role": "system", "content": "s"}, user("a"), assistant("b")], "leaves the system message out"),
        (CHAT_TEMPLATE,
         [user("a"), assistant("b", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}]),
          {"role": "tool", "content": "c"}, assistant("d")], "leaves tool calls out"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_or_leaves_out_is_said_with_the_row(trainer_of, tmp_path, template, rows, expected):
    (tmp_path / "mine.jinja").write_text(template)
    given = [{"messages": [user("a"), assistant("b")]}, {"messages": rows}]
    text = message_of(lambda: trainer_of(given, prompt_template=str(tmp_path / "mine.jinja")))
    assert text.startswith("train.jsonl, row 1 (line 2): ") and expected in text


def test_rows_with_the_same_prompt_and_another_input_are_not_the_same(tmp_path, trainer_of, caplog):
    rows = [{"instruction": "a", "input": text, "output": "b"} for text in "xy"]
    with caplog.at_level(logging.WARNING):
        trainer_of(rows[:1], validation=rows[1:])
    assert "share" not in caplog.text


# --- truncation -------------------------------------------------------------------------------------------------------


def test_truncation_is_counted_by_file_with_the_first_rows(trainer_of, caplog):
    rows = [{"question": "a", "answer": "b" * (100_000 if i in (1, 4, 5, 7) else 3)} for i in range(8)]
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(rows, validation=[{"question": "c", "answer": "d" * 200}], model="none", max_length=128)
    expected = (
        "train_dataset: 4 of 8 rows cut to max_length=128 tokens: train.jsonl 4 (rows 1, 4, 5, ...). The longest has "
        "100002 tokens. Raise `max_length`"
    )
    assert expected in caplog.text
    assert "validation_dataset: 1 of 1 rows cut to max_length=128 tokens: validation.jsonl 1 (row 0)." in caplog.text
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [5, 128, 5, 5, 128, 128, 5, 128]


def test_nothing_is_said_where_nothing_is_cut(trainer_of, caplog):
    with caplog.at_level(logging.WARNING):
        trainer_of([{"question": "a", "answer": "b" * 126}], model="none", max_length=128)
        trainer_of([{"question": "a", "answer": "b" * 500}], model="none", max_length=None)
    assert "cut to" not in caplog.text
