"""Extractive question answering: rows in the forms of SQuAD, answers as tokens of windows and back,
exact match and F1 (Rajpurkar et al., EMNLP 2016, 1606.05250)."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset

from plmcc.data.rows import Rows, columns_of, data_files, existing, read_table, read_text
from plmcc.data.windows import Inputs, Window, need_offsets, windows
from plmcc.diagnostics import PlmccError, error
from plmcc.utils.types import Values

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TASK = "question-answering"
_ANSWERS = "answers"
_LONGEST = 30  # tokens of an answer, as in the scripts of BERT
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answer(NamedTuple):
    """An answer and the character of the context at which it begins."""

    text: str
    start: int


def load_questions(
    source: str | Sequence[str],
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    limit: int | None = None,
    base: Path | None = None,
) -> Rows:
    """Read questions, contexts and answers: JSON of SQuAD 1.1 or 2.0, or a table.

    Args:
        source: as for `load_rows`.
        text: the columns of question and context; by default `question` and `context`.
        label: the column of the answers; by default `answers`, where it exists.
        limit: keep only the first questions.
        base: as for `load_rows`.

    Raises:
        PlmccError: a file cannot be read, or a column or a part of it is not there.
    """
    name = source if isinstance(source, str) else ", ".join(source)
    table = _squad(source, base) or read_table(source, base)
    columns = ("question", "context") if text is None else text
    if isinstance(columns, str) or len(columns) != 2:
        raise error(
            "PLM301",
            f"{TASK} needs two columns of text",
            name,
            got=str(text),
            hint="write `text: [question, context]`",
        )
    known = columns_of(table, columns, name)
    if label is not None:
        existing(label, table.column_names, name)
    elif _ANSWERS in table.column_names:
        label = _ANSWERS
    kept, skipped = _with_text(table, known, name)
    return Rows(kept.select(range(min(limit or len(kept), len(kept)))), known, label, name, skipped)


def _with_text(table: Dataset, columns: Sequence[str], name: str) -> tuple[Dataset, int]:
    pairs = zip(*(table[column] for column in columns), strict=True)
    keep = [i for i, pair in enumerate(pairs) if all((text or "").strip() for text in pair)]
    if not keep:
        raise error("PLM301", "there are no rows with question and context", name)
    return table.select(keep), len(table) - len(keep)


def _squad(source: str | Sequence[str], base: Path | None) -> Dataset | None:
    """Return the questions of files that are one JSON object each, as SQuAD's; None for others."""
    files = data_files(source, base)
    if not files or not all(file.name.removesuffix(".gz").endswith(".json") for file in files):
        return None
    rows: list[Values] = []
    for file in files:
        try:
            content = json.loads(read_text(file))
        except json.JSONDecodeError:  # lines of JSON, perhaps
            return None
        except RecursionError:
            raise error("PLM301", "the JSON is nested too deep", str(file)) from None
        if not isinstance(content, dict) or "data" not in content:
            return None
        rows += _flat(content, file)
    if not rows:
        raise error("PLM301", "there are no questions", ", ".join(map(str, files)))
    return Dataset.from_list(rows)


def _flat(content: Values, file: Path) -> Iterator[Values]:
    for a, article in enumerate(_part(content, "data", list, str(file))):
        at = f"{file}: data[{a}]"
        for p, paragraph in enumerate(_part(article, "paragraphs", list, at)):
            inner = f"{at}.paragraphs[{p}]"
            context = _part(paragraph, "context", str, inner)
            for q, asked in enumerate(_part(paragraph, "qas", list, inner)):
                location = f"{inner}.qas[{q}]"
                given = [
                    (
                        _part(answer, "text", str, location),
                        _part(answer, "answer_start", int, location),
                    )
                    for answer in _part(asked, _ANSWERS, list, location)
                ]
                yield {
                    "id": str(asked.get("id", location)),
                    "question": _part(asked, "question", str, location),
                    "context": context,
                    _ANSWERS: {
                        "text": [t for t, _ in given],
                        "answer_start": [s for _, s in given],
                    },
                }


def _part(node: object, key: str, kind: type, location: str) -> Any:
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, kind):
        form = "data: [{paragraphs: [{context, qas: [{question, answers}]}]}]"
        message = f"this is not SQuAD: the key `{key}` is missing"
        raise error("PLM301", message, location, allowed=form)
    return value


def answers_of(rows: Rows) -> list[list[Answer]]:
    """Return the answers to each question.

    Raises:
        PlmccError: there is no column of answers, or a question without one.
    """
    if rows.label is None:
        raise error(
            "PLM301",
            f"{TASK} needs answers, but there is no column `{_ANSWERS}`",
            rows.source,
            got=", ".join(rows.table.column_names),
            hint="set `label:` to the name of the column",
        )
    return [_listed(rows, row, value) for row, value in enumerate(rows.labels())]


def _listed(rows: Rows, row: int, value: Any) -> list[Answer]:
    """Read `{text: [...], answer_start: [...]}`, `{text, answer_start}`, or a list of these."""
    try:
        if isinstance(value, list):
            found = [Answer(str(one["text"]), int(one["answer_start"])) for one in value]
        elif isinstance(value["text"], str):
            found = [Answer(value["text"], int(value["answer_start"]))]
        else:
            pairs = zip(value["text"], value["answer_start"], strict=True)
            found = [Answer(str(text), int(start)) for text, start in pairs]
    except (TypeError, KeyError, ValueError):
        raise error(
            "PLM302",
            "the answers do not have the SQuAD format",
            _locate_in(rows, row),
            got=repr(value)[:80],
            allowed="{text: [...], answer_start: [...]}",
        ) from None
    if any(not answer.text.strip() for answer in found):
        hint = "a question without an answer has empty lists"
        raise error("PLM302", "an answer is empty", _locate_in(rows, row), hint=hint)
    return found


def _locate_in(rows: Rows, row: int) -> str:
    identity = rows.table[row].get("id")
    return f"{rows.source}: " + (f"question {identity}" if identity else f"row {row + 1}")


def encode_questions(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None = None
) -> Dataset:
    """Return the model's inputs, with `start_positions` and `end_positions` of answers, if any.

    The first answer of each question counts. A window that does not hold all of it, and a question
    without an answer (SQuAD 2.0), point to the token that stands for the whole input, as in the
    scripts of BERT.

    Raises:
        PlmccError: an answer is not in its context, or the windows leave no room for it.
    """
    inputs, made = question_windows(rows, tokenizer, max_length, stride)
    columns: Values = dict(inputs)
    if rows.label is not None:
        firsts = checked_answers(rows)
        pairs = [_positions(w, firsts[w.row]) or (w.whole, w.whole) for w in made]
        columns["start_positions"] = [first for first, _ in pairs]
        columns["end_positions"] = [last for _, last in pairs]
    return Dataset.from_dict(columns)


def question_windows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None = None
) -> tuple[Inputs, list[Window]]:
    """Return windows of the contexts, each behind its question.

    `stride` tokens are common to neighbors, by default a third of a window; a question is cut
    after a third of it.

    Raises:
        PlmccError: the tokenizer is a slow one, or there is no room for the context.
    """
    need_offsets(tokenizer, TASK)
    longest = max_length // 3
    room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    common = longest if stride is None else stride
    if common >= room:
        message = f"windows of {max_length} tokens that have {common} in common do not advance"
        raise error(
            "PLM303",
            message,
            "train.data.stride",
            allowed=f"stride below {room}: question and special tokens take the rest",
            hint="raise `max_length`, or lower `stride`",
        )
    questions = _cut(rows.texts(0), tokenizer, longest)
    return windows(tokenizer, rows.texts(1), max_length, common, questions)


def _cut(texts: list[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    spans = tokenizer(texts, **options)["offset_mapping"]
    pairs = zip(texts, spans, strict=True)
    return [t if len(span) <= longest else t[: span[longest - 1][1]] for t, span in pairs]


def checked_answers(rows: Rows) -> list[Answer | None]:
    """Return the first answers, without spaces around them; None where there is none.

    Raises:
        PlmccError: an answer does not stand in its context where it says.
    """
    found: list[Answer | None] = []
    pairs = zip(rows.texts(1), answers_of(rows), strict=True)
    for row, (context, answers) in enumerate(pairs):
        if not answers:
            found.append(None)
            continue
        answer = answers[0]
        there = context[max(0, answer.start) :][: len(answer.text)]
        if there != answer.text or answer.start < 0:
            raise _mismatch(rows, row, answer, there)
        left = len(answer.text) - len(answer.text.lstrip())
        found.append(Answer(answer.text.strip(), answer.start + left))
    return found


def _mismatch(rows: Rows, row: int, answer: Answer, there: str) -> PlmccError:
    at = rows.texts(1)[row].find(answer.text)
    hint = f"the answer is at {at}" if at >= 0 else "the answer does not occur in the context"
    return error(
        "PLM302",
        f"the answer is not at character {answer.start} of its context",
        _locate_in(rows, row),
        got=repr(there[:80]),
        allowed=repr(answer.text[:80]),
        hint=f"{hint}; characters count from 0",
    )


def _positions(window: Window, answer: Answer | None) -> tuple[int, int] | None:
    """Return the first and last token of an answer; None if the window does not hold all of it."""
    if answer is None:
        return None
    spans_N2, end = window.spans_N2, answer.start + len(answer.text)
    if not len(spans_N2) or spans_N2[0, 0] > answer.start or spans_N2[-1, 1] < end:
        return None
    first = int((spans_N2[:, 1] <= answer.start).sum())
    last = int((spans_N2[:, 0] < end).sum()) - 1
    return (window.begin + first, window.begin + last) if first <= last else None


def best_answers(
    rows: Rows, made: Sequence[Window], outputs: Iterable[tuple[list[int], Any]]
) -> list[str]:
    """Return the text of the best span of each question, over all windows of its context.

    Where some questions have no answer (SQuAD 2.0), the text is empty if the lowest score of "no
    answer" over the windows is above that of the span, as in the scripts of BERT.

    `outputs` are, batch by batch, the places of windows in `made` and what the model returns.
    """
    contexts, best = rows.texts(1), [(float("-inf"), "")] * len(rows)
    none = [float("inf")] * len(rows)
    for order, output in outputs:
        batch = [made[index] for index in order]
        found = best_spans(output["start_logits"], output["end_logits"], batch)
        for window, score, first, last in zip(batch, *found, strict=True):
            if score > best[window.row][0]:
                span = window.spans_N2[[first - window.begin, last - window.begin]]
                text = contexts[window.row][span[0, 0] : span[1, 1]].strip()
                best[window.row] = (score, text)
        for index, window in enumerate(batch):
            logits = (output[name][index, window.whole] for name in ("start_logits", "end_logits"))
            none[window.row] = min(none[window.row], float(sum(logits)))
    if not (rows.label is not None and any(not given for given in answers_of(rows))):
        return [text for _, text in best]
    return ["" if n > score else text for n, (score, text) in zip(none, best, strict=True)]


def best_spans(
    start_BL: Tensor, end_BL: Tensor, batch: Sequence[Window]
) -> tuple[list[float], list[int], list[int]]:
    """Return score (the sum of both logits), first and last token of the best span in the context
    of each window, of at most 30 tokens. The score is -inf where there is no context."""
    import torch  # data are checked without it

    device, length = start_BL.device, start_BL.shape[1]
    places_L = torch.arange(length, device=device)
    begin_B1 = torch.tensor([[window.begin] for window in batch], device=device)
    size_B1 = torch.tensor([[len(window.spans_N2)] for window in batch], device=device)
    outside_BL = (places_L < begin_B1) | (places_L >= begin_B1 + size_B1)
    starts_BL = start_BL.float().masked_fill(outside_BL, -torch.inf)
    ends_BL = end_BL.float().masked_fill(outside_BL, -torch.inf)
    sums = [
        starts_BL + torch.nn.functional.pad(ends_BL[:, more:], (0, more), value=-torch.inf)
        for more in range(min(_LONGEST, length))
    ]
    best_BL, more_BL = torch.stack(sums).max(0)
    score_B, first_B = best_BL.max(1)
    last_B = first_B + more_BL.gather(1, first_B[:, None])[:, 0]
    return score_B.tolist(), first_B.tolist(), last_B.tolist()


def squad(metric: str, found: Sequence[str], truths: Sequence[Sequence[str]]) -> float:
    """Return the mean over questions of `exact_match` or `f1` with the answer that fits best, as
    SQuAD's own scripts (1.1 and 2.0) compute it, in 0..1; without an answer, nothing is right."""
    measure = _exact if metric == "exact_match" else _f1
    pairs = zip(found, truths, strict=True)
    scores = [
        max(measure(normalized(f), normalized(t)) for t in true) if true else float(not f.strip())
        for f, true in pairs
    ]
    return sum(scores) / len(scores)


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and superfluous spaces."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _exact(found: str, truth: str) -> float:
    return float(found == truth)


def _f1(found: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words."""
    one, two = found.split(), truth.split()
    same = sum((Counter(one) & Counter(two)).values())
    return 2 * same / (len(one) + len(two)) if same else 0.0
