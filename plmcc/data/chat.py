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
    texts = []
    for row, conversation in enumerate(messages):
        try:
            texts.append(str(tokenizer.apply_chat_template(conversation, tokenize=False)))
        except Exception as problem:  # what the author of a template raises
            message = f"the chat template refuses {rows.place(row)}: {problem}"
            raise error("PLM302", message, f"{rows.source}: {rows.text[0]}") from None
    table = Dataset.from_dict({_TEXT: texts})
    return replace(rows, table=table, text=(_TEXT,), verbatim=True)
