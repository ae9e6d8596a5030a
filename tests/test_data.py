"""Known answers for every format that is read and for every error that a user can make."""

import codecs
import gzip
import json
import math
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import message_of
from datasets import Dataset, DatasetDict

from tamis.data import load_rows
from tamis.rows import check_rows

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
QA = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?\n", "answer": " 6"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOLS = json.dumps([TOOL])
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, rows: list) -> Path:
    """Write rows as JSON lines, or as a list where the file is called .json."""
    text = json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(path, **kwargs) -> Dataset:
    return load_rows(path, role="train_dataset", **kwargs)


# --- formats ---


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.json", "qa.jsonl.gz", "qa.json.gz", "qa.JSONL"])
def test_json_of_every_kind(tmp_path, name):
    rows = load(write(tmp_path / name, QA))
    assert rows.to_dict() == {
        "prompt": ["2+2?", "3+3?\n"],
        "completion": ["4", " 6"],
        "row": [0, 1],
        "source": [name, name],
    }
    assert rows.features["row"].dtype == "int64"


def test_json_list_compressed(tmp_path):
    path = tmp_path / "qa.json.gz"
    path.write_bytes(gzip.compress(json.dumps(QA).encode()))
    assert load(path)["completion"][:] == ["4", " 6"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "", "completion": "b"}, {"prompt": "", "completion": "b"}),
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
        ({"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
        ({"question": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "input": None, "output": "b"}, {"prompt": "a", "completion": "b"}),
        (
            {"instruction": "a", "input": " x\n", "output": "b", "text": "t"},
            {"prompt": "a", "prompt_input": " x\n", "completion": "b"},
        ),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["c", "d"]]},
            {"prompt": "a", "completion": "b", "system": "s", "history": [["c", "d"]]},
        ),
        ({"instruction": "a", "output": "b", "system": " ", "history": []}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, {"prompt": "a", "completion": "b", "tools": TOOLS}),
        ({"conversations": CHAT, "tools": TOOLS, "system": "s"}, {"messages": CHAT, "tools": TOOLS, "system": "s"}),
        ({"conversations": CHAT, "tools": "[]", "system": ""}, {"messages": CHAT}),
        ({"text": "a"}, {"text": "a"}),
        ({"messages": CHAT, "prompt": "a"}, {"messages": CHAT}),
        ({"conversations": CHAT}, {"messages": CHAT}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        ({"prompt": CHAT[:1], "response": CHAT[1:]}, {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s", "weight": 0},
                    {"from": "human", "value": "", "weight": 0},
                    {"from": "gpt", "value": "b", "weight": 1},
                ]
            },
            {
                "messages": [
                    {"role": "system", "content": "s", "weight": 0},
                    {"role": "user", "content": "", "weight": 0},
                    {"role": "assistant", "content": "b", "weight": 1},
                ]
            },
        ),
    ],
)
def test_layouts(tmp_path, row, expected):
    loaded = load(write(tmp_path / "a.jsonl", [{**row, "other": 1, "row": "x", "source": 3, "weight": "w"}]))
    assert loaded[0] == {**expected, "row": 0, "source": "a.jsonl"}
    check_rows(loaded, "train_dataset")


def test_named_columns_and_weight(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "a": "b", "text": "t", "w": 2}, {"q": "c", "a": "d", "w": 0.5}])
    rows = load(path, prompt_column="q", response_column="a", weight_column="w")
    assert rows.to_dict() | {"row": 0, "source": 0} == {
        "prompt": ["a", "c"],
        "completion": ["b", "d"],
        "weight": [2.0, 0.5],
        "row": 0,
        "source": 0,
    }
    assert rows.features["weight"].dtype == "float64"


def test_csv_keeps_what_is_written(tmp_path):
    path = tmp_path / "a.csv"
    text = '\ufeffquestion,answer,w\r\nname,NA,1\r\n"a ""b"",\r\nc",007,0.5\r\nday,2024-01-02,0\r\n'
    path.write_bytes(text.encode())
    rows = load(path, weight_column="w")
    assert rows["prompt"][:] == ["name", 'a "b",\r\nc', "day"]
    assert rows["completion"][:] == ["NA", "007", "2024-01-02"]
    assert rows["weight"][:] == [1.0, 0.5, 0.0]


def test_csv_with_bare_carriage_returns(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\ra,"b\rc"\rd,e\r')
    assert load(tmp_path / "a.csv")["completion"][:] == ["b\rc", "e"]


def test_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\na,b\tsay "hi", now\n')
    assert load(tmp_path / "a.tsv")[0] == {"prompt": "a,b", "completion": 'say "hi", now', "row": 0, "source": "a.tsv"}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, kind):
    table = pa.table({"prompt": pa.array(["a", "b"], pa.string()), "completion": pa.array(["c", "d"]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = load(tmp_path / "a.parquet")
    assert (rows["prompt"][:], rows["completion"][:]) == (["a", "b"], ["c", "d"])
    assert rows.features["completion"].dtype == "string"


def test_dates_stay_text(tmp_path):
    rows = load(write(tmp_path / "a.jsonl", [{"prompt": "day?", "completion": "2024-01-02"}]))
    assert rows[0]["completion"] == "2024-01-02"


def test_bom_crlf_and_line_separators_within_strings(tmp_path):
    text = '{"prompt": "a", "completion": "x\u2028y\x85z"}\r\n{"prompt": "b", "completion": "z"}\r\n\r\n'
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load(tmp_path / "a.jsonl")["completion"][:] == ["x\u2028y\x85z", "z"]


def test_huge_row(tmp_path):
    answer = "x" * 3_000_000
    (tmp_path / "a.csv").write_text(f"prompt,completion\na,{answer}\n")
    write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": answer}])
    assert load(tmp_path / "a.csv")[0]["completion"] == load(tmp_path / "a.jsonl")[0]["completion"] == answer


def test_a_changed_file_is_read_anew(tmp_path):
    assert load(write(tmp_path / "a.jsonl", QA))["completion"][0] == "4"
    assert load(write(tmp_path / "a.jsonl", QA[1:]))["completion"][:] == [" 6"]


def test_rows_are_read_in_batches(tmp_path, monkeypatch):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    other = {**call, "tool_calls": [{"name": "g", "arguments": {"x": 1}}], "name": "n"}
    rows = [
        *({"messages": chat} for chat in (CHAT, [CHAT[0], call, CHAT[1]], [CHAT[0], other, *CHAT])),
        {"id": 1, "messages": CHAT},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    pairs = write(tmp_path / "b.json", [{"prompt": str(i), "response": "x", "w": i} for i in range(5)])
    at_once = [load(path).to_dict(), load(pairs, weight_column="w").to_dict()]
    monkeypatch.setattr("tamis.rows.BATCH_SIZE", 1)
    assert [load(path).to_dict(), load(pairs, weight_column="w").to_dict()] == at_once
    assert at_once[1]["prompt"] == ["0", "1", "2", "3", "4"] and at_once[1]["row"] == [0, 1, 2, 3, 4]
    write(pairs, [{"prompt": str(i), "response": "x" * (i % 2), "w": i - 2} for i in range(5)])
    assert message_of(lambda: load(pairs, weight_column="w")) == (
        'b.json, row 0, column "response": the response is empty. Remove the row or fill it in. '
        "3 rows of the column are bad, first 0, 2, 4."
    )


def test_columns_that_only_later_rows_have(tmp_path, monkeypatch):
    monkeypatch.setattr("tamis.rows.BATCH_SIZE", 1)
    bare, whole = {"instruction": "a", "output": "b"}, {"instruction": "c", "input": "x", "output": "d"}
    rows = load(write(tmp_path / "a.jsonl", [bare, whole, bare]))
    assert rows["prompt"][:] == ["a", "c", "a"] and rows["prompt_input"][:] == [None, "x", None]
    text = message_of(lambda: load(write(tmp_path / "a.jsonl", [{"text": "a"}, {"prompt": "a", "completion": "b"}])))
    assert text == (
        "a.jsonl: the first rows have the columns text, later ones prompt, completion. Give all rows the same."
    )
    text = message_of(lambda: load(write(tmp_path / "a.jsonl", [whole, {"instruction": "c"}])))
    assert text.startswith('a.jsonl, row 1 (line 2), column "output": the response is missing.')


def test_equal_tables_have_equal_fingerprints(tmp_path):
    """`datasets` names its caches by them."""
    first = load(write(tmp_path / "a.jsonl", QA))
    assert first._fingerprint == load(write(tmp_path / "a.jsonl", QA))._fingerprint
    assert first._fingerprint != load(write(tmp_path / "a.jsonl", QA[::-1]))._fingerprint


def test_folder_takes_the_files_of_one_split_in_order(tmp_path, caplog):
    for name in ("b/sub/train-2.jsonl", "b/train-1.jsonl", "b/test.jsonl", "b/train.csv"):
        write(tmp_path / name, [{"prompt": "p", "completion": name}])
    rows = load(tmp_path / "b")
    assert sorted(rows["source"][:]) == ["b/sub/train-2.jsonl", "b/train-1.jsonl"]
    assert rows["completion"][:] == rows["source"][:]
    assert rows["row"][:] == [0, 0]
    assert "train.csv is left out" in caplog.text
    assert load(tmp_path / "b", split="test")["source"][:] == ["b/test.jsonl"]
    assert "no split 'dev', only train, test" in message_of(lambda: load(tmp_path / "b", split="dev"))


def test_blank_lines_are_skipped_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n \n{"text": "b"}\n\n')
    rows = load(tmp_path / "a.jsonl")
    assert (rows["text"][:], rows["row"][:]) == (["a", "b"], [0, 1])
    assert "a.jsonl: 2 blank lines are skipped" in caplog.text


def test_saved_data_set(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    rows.select([1, 0]).save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "many")
    assert load(tmp_path / "one")["prompt"][:] == ["c", "a"]
    assert load(tmp_path / "many")["source"][:] == ["many", "many"]
    assert "no split 'test', only train" in message_of(lambda: load(tmp_path / "many", split="test"))


# --- errors of reading ---


def test_missing_file(tmp_path):
    for name in ("no.jsonl", "no", "sub/dir/no"):
        text = message_of(lambda name=name: load(tmp_path / name))
        assert "no such file or folder. Check `train_dataset`." in text and name in text
    assert "no such file or folder" in message_of(lambda: load(""))
    assert message_of(lambda: load("no_such_file.json")).startswith("no_such_file.json: no such file or folder.")


@pytest.mark.parametrize("name", ["nobody/no-such-data", "nobody/no-such-data-2.5:main"])
def test_hub_failure_is_one_line(monkeypatch, name):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub.\nsecond line")

    monkeypatch.setattr("tamis.data.load_dataset", load_dataset)
    monkeypatch.setattr("tamis.data.HfApi.dataset_info", lambda *args, **kwargs: None)
    text = message_of(lambda: load(name))
    assert text.startswith(
        f"{name}: no such file or folder, nor a hub data set with split 'train'; check `train_dataset` ("
    )
    assert text.endswith("(ConnectionError: Couldn't reach the hub).")


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch):
    def dataset_info(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("tamis.data.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("tamis.data.load_dataset", lambda *args, **kwargs: 1 / 0)
    assert message_of(lambda: load("train")).endswith("check `train_dataset` (ConnectionError: no network).")


def test_hub_name_with_config(monkeypatch):
    seen = []

    def load_dataset(*args, **kwargs):
        seen.append((args, kwargs))
        return Dataset.from_list(QA)

    monkeypatch.setattr("tamis.data.load_dataset", load_dataset)
    monkeypatch.setattr("tamis.data.HfApi.dataset_info", lambda *args, **kwargs: None)
    rows = load("openai/gsm8k:main", split="test")
    assert seen == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert rows["source"][:] == ["openai/gsm8k:main"] * 2
    load("nobody/OpenHermes-2.5")
    assert seen[1] == (("nobody/OpenHermes-2.5", None), {"split": "train"})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, row 1 (line 2)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, row 1 (line 3)"),
        ("a.jsonl", b'[{"text": "a"}]', "a.jsonl, row 0 (line 1): [{'text': 'a'}] is not an object"),
        ("a.jsonl", b'{"text": "a"}{"text": "b"}', "Extra data at character 14"),
        ("a.json", b'[{"text": "a"},\n{"text": ]', "a.json, line 2: not valid JSON (Expecting value"),
        ("a.json", b'[{"text": "a"}, "b"]', "a.json, row 1: 'b' is not an object"),
        ("a.json", b'{\n"data": [\n]}', "a.json, row 0 (line 1), which must be one whole object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}', "a.jsonl, row 1 (line 2): half of a surrogate pair"),
        ("a.jsonl", '{"text": "ä"}'.encode("utf-16"), "a.jsonl: cannot be read as UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n \n\n[]\n\n', "a.jsonl, row 1 (line 2): [] is not an object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "can't decode byte 0xff in position 10: invalid start byte (line 2)",
        ),
        ("a.jsonl", b"", "a.jsonl: there are no rows"),
        ("a.csv", b" \n\n", "a.csv: "),
        ("a.json", b"[]", "a.json: there are no rows"),
        ("a.csv", b"", "a.csv: there are no rows"),
        ("a.csv", b"prompt,completion\n", "a.csv: there are no rows"),
        ("a.csv", b"prompt,completion\na,b\na\n", "a.csv, row 1 (line 3): 1 values for 2 columns"),
        ("a.csv", b"prompt,completion\na,b,c\n", "a.csv, row 0 (line 2): 3 values for 2 columns"),
        ("a.csv", b'prompt,completion\na,"b\nc,d\n', "unexpected end of data"),
        ("a.csv", b"prompt,text,text\na,b,c\n", "a column is named twice in the header prompt, text, text"),
        ("a.parquet", b"PAR1 but no more", "a.parquet: cannot be read as Parquet"),
        ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.txt", b"a", "a.txt: unknown kind of file. Give one of .json, .jsonl, .csv"),
    ],
)
def test_broken_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in message_of(lambda: load(tmp_path / name))


def test_folder_without_data(tmp_path):
    assert "the folder has no files of rows. Give it some, of .json" in message_of(lambda: load(tmp_path))


def test_damaged_saved_data_set(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    assert "cannot be read as a saved data set" in message_of(lambda: load(tmp_path))


def test_files_of_unlike_layouts(tmp_path):
    write(tmp_path / "b/1.jsonl", [{"text": "a"}])
    write(tmp_path / "b/2.jsonl", [{"prompt": "a", "completion": "b"}])
    assert message_of(lambda: load(tmp_path / "b")).startswith("b/2.jsonl: not the layout of b/1.jsonl")
    write(tmp_path / "b/2.jsonl", [{"prompt": CHAT[:1], "completion": CHAT[1:]}])
    write(tmp_path / "b/1.jsonl", [{"prompt": "a", "completion": "b"}])
    assert "the rows do not fit into one table" in message_of(lambda: load(tmp_path / "b"))


def test_parquet_with_a_column_twice(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    assert "a.parquet" in message_of(lambda: load(tmp_path / "a.parquet"))


def test_unknown_layout_and_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}])
    text = message_of(lambda: load(path))
    assert text.startswith("a.jsonl: no known layout fits the columns q, a.")
    assert "`prompt_column` and `response_column`" in text
    assert 'no column "b"; there is q, a' in message_of(lambda: load(path, prompt_column="q", response_column="b"))
    named = {"prompt_column": "q", "response_column": "a"}
    assert 'no column "w"; there is q, a' in message_of(lambda: load(path, **named, weight_column="w"))
    assert "train_dataset: `prompt_column`" in message_of(lambda: load(path, prompt_column="q"))
    assert "name two columns" in message_of(lambda: load(path, prompt_column="q", response_column="q"))


def test_a_column_with_a_line_break_in_its_name_is_named_on_one_line(tmp_path):
    """Found by benchmarks/fuzz_readers.py."""
    path = write(tmp_path / "a.jsonl", [{"q\nr": "a", "a": "b"}])
    assert "the columns 'q\\nr', a." in message_of(lambda: load(path))


# --- errors of rows ---


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (
            {"prompt": "a", "completion": ""},
            'column "completion": the response is empty. Remove the row or fill it in.',
        ),
        ({"prompt": "a", "completion": " \t\n\u00a0\u3000"}, 'column "completion": the response is empty.'),
        ({"prompt": "a", "completion": None}, 'column "completion": the response is missing.'),
        ({"prompt": "a"}, 'column "completion": the response is missing.'),
        ({"prompt": None, "completion": "b"}, 'column "prompt": the prompt is missing.'),
        ({"prompt": "a", "completion": 18}, 'column "completion": the response 18 is not text.'),
        ({"prompt": True, "completion": "b"}, 'column "prompt": the prompt True is not text.'),
        ({"prompt": {"x": 1}, "completion": "b"}, "column \"prompt\": the prompt {'x': 1} is not text."),
        ({"prompt": CHAT[:1], "completion": "b"}, 'column "prompt": text and lists of messages are mixed.'),
        ({"prompt": "a", "completion": CHAT[1:]}, 'column "completion": text and lists of messages are mixed.'),
    ],
)
def test_bad_pair(tmp_path, bad, expected):
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "a.jsonl", [good] * 16 + [bad])
    assert message_of(lambda: load(path)).startswith(f"a.jsonl, row 16 (line 17), {expected}")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([], "there are no messages."),
        (None, "the list of messages is missing."),
        ("hello", "'hello' is not a list of messages."),
        (["hello"], "message 0 has no role."),
        ([{"content": "a"}], "message 0 has no role."),
        ([*CHAT, {"role": "user", "content": None}], "the content of message 2 is None, not text."),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "the content of message 0 is [{'type': 'text'}], not text.",
        ),
        (CHAT[:1], "no message of the assistant has content."),
        ([CHAT[0], {"role": "assistant", "content": " \n"}], "no message of the assistant has content."),
        ([CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}], "no message of the assistant has content."),
    ],
)
def test_bad_messages(tmp_path, bad, expected):
    path = write(tmp_path / "a.json", [{"messages": CHAT}, {"messages": bad}])
    assert message_of(lambda: load(path)).startswith(f'a.json, row 1, column "messages": {expected}')


def test_message_with_a_tool_call_may_lack_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = load(write(tmp_path / "a.jsonl", [{"messages": [CHAT[0], call, CHAT[1]]}]))
    assert rows[0]["messages"][1]["tool_calls"] == [{"name": "f"}]


def test_errors_name_the_columns_of_the_file(tmp_path):
    path = write(tmp_path / "a.json", [{"instruction": "a", "input": 5, "output": "b"}])
    assert message_of(lambda: load(path)).startswith('a.json, row 0, column "input": the input 5 is not text.')
    path = write(tmp_path / "a.json", [{"instruction": "a", "input": "x", "output": ""}])
    assert message_of(lambda: load(path)).startswith('a.json, row 0, column "output": the response is empty.')
    path = write(tmp_path / "a.json", [{"text": " "}])
    assert message_of(lambda: load(path)).startswith('a.json, row 0, column "text": the text is empty.')


def test_numbers_in_parquet(tmp_path):
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [4, 5]}), tmp_path / "a.parquet")
    text = message_of(lambda: load(tmp_path / "a.parquet"))
    assert text.startswith('a.parquet, row 0, column "answer": the response 4 is not text.')


@pytest.mark.parametrize("weight", [math.nan, math.inf, -0.5, None, "x", "", 10**400, [1]])
def test_bad_weight(tmp_path, weight):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "w": 1}, {"text": "b", "w": weight}])
    text = message_of(lambda: load(path, weight_column="w"))
    assert text.startswith('a.jsonl, row 1 (line 2), column "w": the weight ')
    assert text.endswith("is not a finite number >= 0.")
    assert len(text) < 150


def test_real_alpaca(tmp_path):
    path = DATA / "alpaca" / "claude_t45.json"
    if not path.exists():
        pytest.skip("shared/data/alpaca is not here")
    raw = json.loads(path.read_text())
    assert len(raw) == 5305
    empty = [i for i, row in enumerate(raw) if not row["output"]]
    text = message_of(lambda: load_rows(path, role="validation_dataset"))
    assert text.startswith(f'claude_t45.json, row {empty[0]}, column "output": the response is empty.')
    assert text.endswith(f"{len(empty)} rows of the column are bad, first {', '.join(map(str, empty[:9]))}.")

    raw = [row for row in raw if row["output"]]
    rows = load_rows(write(tmp_path / "alpaca.json", raw), role="validation_dataset")
    assert rows["row"][:] == list(range(len(raw)))
    assert rows["completion"][:] == [row["output"] for row in raw]
    assert rows["prompt"][:] == [row["instruction"] for row in raw]
    assert rows["prompt_input"][:] == [row["input"] if row["input"].strip() else None for row in raw]
    check_rows(rows, "validation_dataset")
