"""The prompt contract: what text a row becomes, and which of its tokens are trained on.

Nothing is added to a prompt that the model's template does not add. Rows with roles (messages) go through the chat
template, as in TRL. Rows without roles do so too where a `prompt_template` says it: prompt and response are one turn of
the user and one of the assistant. Trained on are responses alone, whatever the layout. All of this is settled with the
tokenizer in hand, before the model is loaded.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import get_config_model_id

from tamis.config import BilevelConfig, Resolved
from tamis.forms import is_in_tokens
from tamis.mapped import as_dataset, one_table
from tamis.rows import (
    PROMPT_PARTS,
    batches,
    column_values,
    content_columns,
    is_conversational,
    iter_rows,
    last_answer,
    row_name,
    training_flag,
)
from tamis.settings import first_line, warn_without_effect

logger = logging.getLogger(__name__)

Row = dict[str, Any]
NAMES = (None, "auto", "chat", "plain", "alpaca")
_INPUT_OF_ALPACA = "\n\n### Input:\n"
# Stanford Alpaca's wording; a system message takes the place of the first sentences.
ALPACA = (
    "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] }}"
    "{%- elif '\n\n### Input:\n' in turns[0]['content'] -%}"
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "{%- else -%}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.{%- endif -%}"
    "{%- for message in turns -%}{{ '\n\n' }}"
    "{%- if message['role'] == 'assistant' -%}{{ '### Response:\n' }}"
    "{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] }}"
    "{%- else -%}{{ raise_exception('Alpaca has no turns of ' + message['role']) }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\n### Response:\n' }}{%- endif -%}"
)


class Prompts:
    """How the rows of a run are written, settled for all of its data sets at once.

    Args:
        template: ``auto`` (``chat`` where the model has a chat template, else ``plain``), ``chat`` (the model's own),
            ``plain`` (the text as it is), ``alpaca``, or a jinja file with a chat template. None: rows without roles
            stay as they are, as in [`~trl.SFTTrainer`].
        datasets: by role, checked.
        model, processing_class: as the trainer is given them.

    Attributes:
        template: with ``auto`` settled; None where there is none.
        assistant_only_loss: as TRL is to have it; False too where rows are split before their last answer.
        processing_class: what the trainer is to be given, with the template.
        datasets: the data sets as the trainer is to be given them.

    Raises:
        ValueError: there is no such template, it cannot write the rows, or a part of a row has no place in it.
    """

    def __init__(
        self,
        template: str | None,
        args: BilevelConfig,
        datasets: Mapping[str, Dataset],
        model: Any,
        processing_class: Any = None,
    ):
        self.template, self._args, self.processing_class = template, args, processing_class
        self.joiner, self.reason, self.loss_reason = "\n\n", "as given", ""
        self.assistant_only_loss, self.splits = bool(args.assistant_only_loss), False
        train = datasets["train_dataset"]
        self._content = ["input_ids"] if is_in_tokens(train) else content_columns(train, "train_dataset")
        self.has_roles = any(map(is_conversational, datasets.values()))
        file_text = _read(template, args.chat_template_path)
        if not self.has_roles and (template is None or self._content in (["text"], ["input_ids"])):
            if template not in (None, "auto"):
                reason = "texts and tokens are trained on as they are"
                warn_without_effect(["prompt_template"], {reason: ["prompt_template"]})
            self.template = None
        else:
            if self.processing_class is None:
                self.processing_class = _load_processing_class(model, args)
            self._settle_template(file_text)
        self._settle_loss(datasets)
        for role, dataset in datasets.items():
            self._refuse_parts(role, dataset)
        self.datasets = {role: self.rows(dataset, role) for role, dataset in datasets.items()}
        for role, dataset in self.datasets.items():
            self._check_rendering(role, dataset)

    # --- which template ---------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The chat template that writes the rows; None where they are text."""
        if self.processing_class is None or not (self.has_roles or self.template not in (None, "plain")):
            return None
        found = self.processing_class.chat_template
        text: str | None = found["default"] if isinstance(found, dict) else found
        return text

    @property
    def identity(self) -> str | None:
        """What a run that is resumed must have in common: the template by its name and by its text."""
        if (text := self.chat_template) is None:
            return self.template
        return f"{self.template or 'chat'} {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    def announce(self, resolved: Resolved) -> None:
        """Say what has been settled, each with its reason."""
        resolved.prompts = self.identity
        if self.template is not None:
            resolved.announcements.append(f"prompt_template = {self.template} ({self.reason})")
        if self._content == ["messages"]:
            resolved.announcements.append(f"assistant_only_loss = {self.assistant_only_loss} ({self.loss_reason})")

    def _settle_template(self, file_text: str | None) -> None:
        processing_class, path = self.processing_class, self._args.chat_template_path
        if path is not None:
            processing_class.chat_template = file_text or AutoTokenizer.from_pretrained(path).chat_template
        elif file_text is not None:
            processing_class.chat_template = file_text
        elif self.template == "alpaca":
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            # The tokenizer adds nothing to what a chat template has written.
            starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            processing_class.chat_template = ("{{ bos_token }}" if starts else "") + ALPACA
            self.joiner = _INPUT_OF_ALPACA
        has_template = bool(processing_class.chat_template)
        if self.template == "auto":
            self.template = "chat" if has_template or self.has_roles else "plain"
            self.reason = "the model has a chat template" if has_template else "the model has no chat template"
        if self.template == "plain" and self.has_roles:
            warn_without_effect(["prompt_template"], {"rows with roles need a chat template": ["prompt_template"]})
            self.template = "chat"
        if self.template != "plain" and not has_template:
            raise ValueError(
                "the model has no chat template, which rows with roles and `prompt_template=chat` need: give "
                "`prompt_template=alpaca` or a jinja file"
            )
        if self.template != "plain":
            self._try_out()

    def _try_out(self) -> None:
        """The template writes what the user says, and the answer behind it."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        name = self.template if self.template not in (None, "chat") else "the chat template"
        try:
            prompt = self.render(messages[:1], add_generation_prompt=True)
            whole = self.render(messages)
        except Exception as error:  # jinja raises a dozen kinds
            problem = first_line(error) or type(error).__name__
            raise ValueError(f"{name} cannot write a conversation ({problem}). Correct it.") from error
        if "question" not in prompt or "answer" not in whole:
            raise ValueError(f"{name} does not write the messages: it must go through the messages and their content.")

    def render(self, messages: list[Row], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        processing_class = self.processing_class
        if isinstance(processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        text: str = processing_class.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    # --- what is trained on -----------------------------------------------------------------------------------------

    def _settle_loss(self, datasets: Mapping[str, Dataset]) -> None:
        """Responses alone, where the settings leave it open: every answer, or the last one."""
        args = self._args
        if self._content != ["messages"]:
            return
        several, last_alone = _rows_of_several_answers(datasets)
        if args.assistant_only_loss is not None or args.completion_only_loss is False:
            self.loss_reason = "as given" if args.completion_only_loss is not False else "every token is trained on"
            if last_alone:
                raise ValueError(
                    f"{last_alone[0]} trains on its last answer alone, by train or weight, and the settings on more: "
                    "leave assistant_only_loss and completion_only_loss open"
                )
            return
        if several and last_alone:
            raise ValueError(
                f"{several[0]} trains on several answers, {last_alone[0]} on its last alone, by train or weight. Make "
                "a row of each answer"
            )
        self.assistant_only_loss = bool(several) and self._marks_answers()
        self.splits = not self.assistant_only_loss
        if self.assistant_only_loss:
            self.loss_reason = "every answer is trained on: the chat template marks them"
        elif several:
            self.loss_reason = "the last answer of a row is trained on"
            logger.warning(
                f"{len(several)} rows have several answers, first {several[0]}, and only the last one is trained on: "
                "the chat template does not mark answers with {% generation %}. Give one that does, by "
                "`chat_template_path`, or a row for each answer"
            )
        else:
            self.loss_reason = "a row has one answer, and that is trained on"

    def _marks_answers(self) -> bool:
        if has_generation_markers(self.processing_class.chat_template):
            return True
        try:
            return get_training_chat_template(self.processing_class) is not None
        except ValueError:  # TRL has no marked version of this one
            return False

    # --- rows -------------------------------------------------------------------------------------------------------

    def rows(self, dataset: Dataset, role: str = "the data set") -> Dataset:
        """The rows as TRL is to read them: prompt and completion as text or as messages, or messages, or text.

        Rows that are so already are returned as they are.
        """
        columns = set(dataset.column_names)
        parts = [name for name in PROMPT_PARTS[:3] if name in columns]
        if "messages" in columns and "prompt" not in columns:
            if not self.splits and "system" not in parts:
                return dataset
            names = ["messages"]
        elif {"prompt", "completion"} <= columns:
            writes = self.template not in (None, "plain") and not is_conversational(dataset)
            if not writes and not parts:
                return dataset
            names = ["prompt", "completion"]
        else:
            return dataset
        write = self._write_text if self.template == "plain" else self._write_messages
        return _rewritten(dataset, [*names, *parts], write, role)

    def _write_text(self, row: Row) -> Row:
        return {"prompt": self._with_input(row), "completion": row["completion"]}

    def _with_input(self, row: Row) -> str:
        more = row.get("prompt_input")
        return str(row["prompt"] + (self.joiner + more if more else ""))

    def _write_messages(self, row: Row) -> Row:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        content = row["messages"] if "messages" in row else row["prompt"]
        if isinstance(content, str):
            if self.template is None:
                return {"prompt": content, "completion": row["completion"]}
            turns = [
                {"role": role, "content": text}
                for turn in row.get("history") or []
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            prompt = [*system, *turns, {"role": "user", "content": self._with_input(row)}]
            return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["completion"]}]}
        if system and content[0]["role"] == "system":
            raise ValueError("there is a system message and a column system. Keep one of the two")
        messages = system + content
        if "messages" not in row:
            return {"prompt": messages, "completion": row["completion"]}
        if not self.splits:
            return {"messages": messages}
        last = last_answer(messages)
        if last == 0:
            raise ValueError("there is no message before the answer. Give it the prompt that it answers")
        return {"prompt": messages[:last], "completion": [messages[last]]}

    def _refuse_parts(self, role: str, dataset: Dataset) -> None:
        """Text has no place for who said what."""
        if self.has_roles or self.template not in (None, "plain") or self._content == ["text"]:
            return
        for name in (name for name in PROMPT_PARTS if name in dataset.column_names):
            if self.template == "plain" and name == "prompt_input":
                continue
            used = (i for i, value in _enumerated(dataset, name) if value)
            for i in used:
                remedy = "Set prompt_template to chat or alpaca, or put it into the prompt and remove the column"
                raise ValueError(f'{row_name(dataset, role, i)}, column "{name}": text has no place for it. {remedy}.')

    def _check_rendering(self, role: str, dataset: Dataset) -> None:
        """Write the first row of each kind: what a template refuses or leaves out is known before training."""
        if not is_conversational(dataset):
            return
        names = [name for name in ("prompt", "completion", "messages", "tools") if name in dataset.column_names]
        kinds = set[tuple[Any, ...]]()
        for i, row in enumerate(iter_rows(dataset, names)):
            messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
            tools = row.get("tools")
            kind = (tools is None, *((message["role"], bool(message.get("tool_calls"))) for message in messages))
            if kind not in kinds:
                kinds.add(kind)
                if problem := self._problem_of_rendering(messages, tools):
                    raise ValueError(f"{row_name(dataset, role, i)}: {problem}.")

    def _problem_of_rendering(self, messages: list[Row], tools: Any) -> str | None:
        remedy = "Give another by `prompt_template`, or change the row"
        tools = json.loads(tools) if isinstance(tools, str) else tools
        try:
            text = self.render(messages, tools)
            has_no_tools = bool(tools) and self.render(messages) == text
        except Exception as error:
            return f"the chat template cannot write it ({first_line(error) or type(error).__name__}). {remedy}"
        if has_no_tools:
            return f'column "tools": the chat template leaves tools out. {remedy}'
        for message in messages:
            if message["role"] == "system" and (message.get("content") or "").strip() not in text:
                return f"the chat template leaves the system message out. {remedy}"
            for call in message.get("tool_calls") or []:
                if str((call.get("function") or call).get("name")) not in text:
                    return f"the chat template leaves tool calls out. {remedy}"
        return None


def check_template(template: str | None) -> None:
    """Raise ValueError unless there is such a template."""
    if template in NAMES:
        return
    if not str(template).endswith((".jinja", ".j2")):
        raise ValueError(
            f"prompt_template {template!r}: there is no such template. Choose one of {', '.join(NAMES[1:])}, or give a "
            "file with a chat template whose name ends in .jinja"
        )
    if not Path(str(template)).expanduser().is_file():
        raise ValueError(f"prompt_template {template}: there is no such file. Check the path.")


def _read(template: str | None, chat_template_path: str | None) -> str | None:
    """The text of the jinja file that is given, by one setting or by the other."""
    check_template(template)
    if chat_template_path is not None and template not in (None, "auto", "chat"):
        raise ValueError("prompt_template and chat_template_path both name a template. Leave one of them out.")
    named = chat_template_path if template in NAMES else template
    if named is None or not (path := Path(named).expanduser()).is_file():
        return None  # or the name of a model, whose template TRL takes
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text. Give a file with a chat template.") from error


def _load_processing_class(model: Any, args: BilevelConfig) -> Any:
    """The tokenizer, as `SFTTrainer` would load it."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None  # type: ignore[union-attr]
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def _rows_of_several_answers(datasets: Mapping[str, Dataset]) -> tuple[list[str], list[str]]:
    """The rows with several answers: those that train on all of them, and those that train on the last.

    The first is named, which takes a read, and the others are counted.
    """
    several, last_alone = list[str](), list[str]()
    for role, dataset in datasets.items():
        if "messages" not in dataset.column_names:
            continue
        for i, messages in _enumerated(dataset, "messages"):
            answers = [message for message in messages if message["role"] == "assistant"]
            if len(answers) > 1:
                found = several if training_flag(answers[0]) in (None, 1) else last_alone
                found.append(row_name(dataset, role, i) if not found else "")
    return several, last_alone


def _enumerated(dataset: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    return enumerate(value for batch in batches(dataset) for value in column_values(batch, column))


def _rewritten(dataset: Dataset, names: list[str], write: Callable[[Row], Row], role: str) -> Dataset:
    """The data set with other columns in the place of these."""
    return as_dataset(one_table(_rewritten_batches(dataset, names, write, role), role))


def _rewritten_batches(
    dataset: Dataset, names: list[str], write: Callable[[Row], Row], role: str
) -> Iterator[pa.Table]:
    rest, first = [name for name in dataset.column_names if name not in names], 0
    for batch in batches(dataset):
        assert isinstance(batch, Dataset)
        written = []
        for i, row in enumerate(iter_rows(batch, names)):
            try:
                written.append(write(row))
            except ValueError as error:
                raise ValueError(f"{row_name(dataset, role, first + i)}: {error}.") from error
        first += len(written)
        kept = batch.select_columns(rest).with_format("arrow")[:] if rest else pa.table({})
        columns = {name: pa.array([row[name] for row in written]) for name in written[0]}
        yield pa.table({**dict(zip(kept.column_names, kept.columns, strict=True)), **columns})
