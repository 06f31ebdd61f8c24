"""Conversations as text: rows of messages, written out by the chat template of the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from datasets import Dataset

from plmcc.data.rows import Rows, is_chat
from plmcc.diagnostics import error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "text of the conversation"


def are_chats(rows: Rows) -> bool:
    """Whether the rows are conversations."""
    return len(rows.text) == 1 and any(is_chat(x) for x in rows.table[:100][rows.text[0]])


def messages_of(rows: Rows) -> list[list[dict[str, str]]]:
    """Return the messages of each row.

    Raises:
        PlmccError: a message has no role or no content.
    """
    found: list[list[dict[str, str]]] = list(rows.table[rows.text[0]])
    for row, messages in enumerate(found):
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not isinstance(content, str):
                location = f"{rows.source}: {rows.text[0]}"
                problem = f"a message of {rows.place(row)} is not a role and a content"
                got, allowed = repr(message), '{"role": "user", "content": "a text"}'
                raise error("PLM302", problem, location, got=got, allowed=allowed)
    return found


def as_text(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Return conversations as rows of text, with the special tokens that the template writes.

    Raises:
        PlmccError: the tokenizer has no chat template, or it refuses a conversation.
    """
    messages = messages_of(rows)
    if not tokenizer.chat_template:
        message = "the rows are conversations, and the tokenizer has no chat template"
        hint = "use a model that was trained on chats, or rows with a column `text`"
        raise error("PLM303", message, rows.source, hint=hint)
    texts, learned = [], []
    for row, conversation in enumerate(messages):
        try:
            texts.append(_written(tokenizer, conversation))
            learned.append(_said(tokenizer, conversation, texts[-1]))
        except Exception as problem:  # what the author of a template raises
            message = f"the chat template refuses {rows.place(row)}: {problem}"
            raise error("PLM302", message, f"{rows.source}: {rows.text[0]}") from None
    table = Dataset.from_dict({_TEXT: texts})
    whole = not any(learned)  # nobody is called assistant, or the template cannot be cut
    spans = () if whole else tuple(learned)
    return replace(rows, table=table, text=(_TEXT,), verbatim=True, learned=spans)


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], begin: bool = False
) -> str:
    """Return messages as text; `begin` adds what stands before the answer."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin))


def _said(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], text: str
) -> tuple[tuple[int, int], ...]:
    """Return where in the text of a conversation the assistant's messages are, with their ends.

    A message is what the template adds to the messages before it. Of a template that writes
    earlier messages in another way when others follow, it is the place of the content, and what
    the template writes behind the content of a last message, if that follows here too.
    """
    found, start = [], 0
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant":
            start = max(start, text.find(content, start) + len(content))
            continue
        before = _written(tokenizer, messages[:index], begin=True) if index else ""
        after = _written(tokenizer, messages[: index + 1])
        if after.startswith(before) and text.startswith(after):
            begin, end = len(before), len(after)
        else:
            begin = text.find(content, start)
            end = begin + len(content)
            behind = after[after.rfind(content) + len(content) :]
            end += len(behind) if text.startswith(behind, end) else 0
        if begin >= 0:
            found.append((begin, end))
            start = end
    return tuple(found)
