"""Rows to train and evaluate on: local txt, csv, tsv, jsonl and parquet files (also .gz), hub data
sets, or none.

Reading goes through the `datasets` library. Without data, `synthetic` draws token sequences by
Zipf's law; a teacher's outputs are then the only targets.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import math
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset

from plmcc.data.separated import options_of
from plmcc.data.sound import check_nested, check_packed
from plmcc.diagnostics import did_you_mean, error, listing
from plmcc.recipe.load import Synthetic
from plmcc.utils.files import matching_files
from plmcc.utils.text import first_line
from plmcc.utils.types import Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYNTHETIC = "synthetic"
_BUILDERS = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_SINGLE = ("text", "sentence", "content")
_LOOKED_AT = 100
"""Rows that show what a column holds."""
_CHATS = ("messages", "conversations", "chat")
_PAIRS = (
    ("source", "target"),
    ("src", "tgt"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
)
_LABELS = ("label", "labels", "score")
_YES, _NO = ("1", "1.0", "True", "true"), ("0", "0.0", "False", "false")

if not sys.stderr.isatty():
    disable_progress_bars()


@dataclass(frozen=True)
class Rows:
    """Rows with one or two text columns and perhaps a label column. `source` names them in
    errors."""

    table: Dataset
    text: tuple[str, ...]
    label: str | None
    source: str
    skipped: int = 0
    """Rows left out because a text is missing."""
    kept: tuple[int, ...] = ()
    """The number of each row before others were left out, from 0."""
    first_line: int = 0
    """The line of row 0 in its file; 0 where rows are no lines of one file."""
    prefix: str = ""
    """What is put before each text: the prompt of the model."""
    verbatim: bool = False
    """Whether the texts have their special tokens already, as a chat template writes them."""
    learned: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Of conversations, the first and the last + 1 character of what the assistant says in each
    text: what is learned. Empty: everything."""

    def __len__(self) -> int:
        return len(self.table)

    def spread(self, count: int | None, whole: bool = False) -> Rows:
        """Return so many rows, evenly spaced; all where there are not more. `whole` keeps all rows
        of a first text, and at least one of these."""
        if count is None or len(self) <= count:
            return self
        chosen = [index * len(self) // count for index in range(count)]
        if whole:
            groups = list(self.groups().values())
            some = max(1, len(groups) * count // len(self))
            picked = (groups[index * len(groups) // some] for index in range(some))
            chosen = sorted(row for group in picked for row in group)
        kept = tuple(self.kept[index] for index in chosen) if self.kept else tuple(chosen)
        learned = tuple(self.learned[index] for index in chosen) if self.learned else ()
        return replace(self, table=self.table.select(chosen), kept=kept, learned=learned)

    def groups(self) -> dict[str, list[int]]:
        """Return the places of the rows of each first text: of a query, those of its candidates."""
        found: dict[str, list[int]] = {}
        for row, text in enumerate(self.texts()):
            found.setdefault(text, []).append(row)
        return found

    def texts(self, column: int = 0) -> list[str]:
        """Return the texts of one of the text columns."""
        texts = list(self.table[self.text[column]])
        return [f"{self.prefix}{text}" for text in texts] if self.prefix else texts

    def place(self, row: int) -> str:
        """Return where a row is, for an error: its line in the file, or its number."""
        number = self.kept[row] if self.kept else row
        return f"line {number + self.first_line}" if self.first_line else f"row {number + 1}"

    def numbers(self) -> list[float]:
        """Return the labels as numbers.

        Raises:
            PlmccError: there is no label column, or a label is not a number.
        """
        found = []
        for row, value in enumerate(self.labels()):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            found.append(number)
            if not math.isfinite(number):
                location = f"{self.source}: {self.label}"
                raise error(
                    "PLM302",
                    f"the label of {self.place(row)} is not a number",
                    location,
                    got=repr(value),
                ) from None
        return found

    def labels(self, none: Any = None) -> list[Any]:
        """Return the labels.

        Args:
            none: what stands for a missing one; by default it is an error.

        Raises:
            PlmccError: there is no label column, or a row has none.
        """
        if self.label is None:
            columns = listing(self.table.column_names)
            raise error(
                "PLM301",
                "labels are needed, but no column contains them",
                self.source,
                got=columns,
                hint="set `label:` to the name of the column",
            )
        values = list(self.table[self.label])
        for row, value in enumerate(values):
            if value is None or (isinstance(value, float) and np.isnan(value)):
                if none is None:
                    message = f"{self.place(row)} has no label"
                    raise error("PLM302", message, f"{self.source}: {self.label}")
                values[row] = none
        return values


def load_rows(
    source: str | Sequence[str],
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    limit: int | None = None,
    base: Path | None = None,
    target: str | Sequence[str] | None = None,
) -> Rows:
    """Read rows.

    Args:
        source: a file, a glob, `hub:name[/config][@split]`, or a list of files.
        text: the text column or the two columns of a pair; by default the first usual name that
            exists.
        label: the label column; by default the first usual name that exists. Of several columns
            each says by 0 or 1 whether a row has the label of its name.
        limit: keep only the first rows.
        base: where relative paths start, if they do not exist in the current directory.
        target: the second texts of pairs where they are files of their own, line by line.

    Raises:
        PlmccError: a file is missing, empty, unreadable or of an unknown kind, or a column is not
            there.
    """
    name = source if isinstance(source, str) else ", ".join(source)
    table = read_table(source, base)
    if target is not None:
        table, text, label = _aligned(table, text, name, target, base), None, None
    columns = columns_of(table, text, name)
    if label is not None and not isinstance(label, str):
        table, label = _joined(table, label, name, _first_line(source, base, len(table)))
    found_label = _label_column(table, label, name)
    texts = zip(*(table[column] for column in columns), strict=True)
    kept = [i for i, row in enumerate(texts) if all(_is_there(text) for text in row)]
    if not kept:
        raise error("PLM301", f"every row is empty in {' and '.join(columns)}", name)
    skipped, kept = len(table) - len(kept), kept[:limit]
    first = _first_line(source, base, len(table))
    return Rows(table.select(kept), columns, found_label, name, skipped, tuple(kept), first)


def _is_there(text: Any) -> bool:
    return bool(text) if isinstance(text, list) else bool((text or "").strip())


def _first_line(source: str | Sequence[str], base: Path | None, rows: int) -> int:
    """Return the line of the first row of a file in which every row is a line; else 0: a text with
    line breaks, or an empty line, moves the rows after it."""
    files = data_files(source, base)
    if len(files) != 1 or files[0].suffix == ".gz":
        return 0
    with files[0].open("rb") as stream:
        lines = sum(1 for _ in stream)
    header = _kind(files[0]) in (".csv", ".tsv")
    return 1 + header if lines == rows + header else 0


def read_table(source: str | Sequence[str], base: Path | None = None) -> Dataset:
    """Return the rows of files or of a data set of the hub as they are, with all columns.

    Raises:
        PlmccError: as `load_rows` says.
    """
    name = source if isinstance(source, str) else ", ".join(source)
    if name == SYNTHETIC:
        message = "synthetic rows have no text and no labels to evaluate on"
        raise error("PLM301", message, name, hint="name a file")
    table = _from_hub(name) if name.startswith("hub:") else _from_files(source, base)
    if len(table) == 0:
        raise error("PLM301", "there are no rows", name)
    return table


def read_text(file: Path) -> str:
    """Return what is in a file of text, which may be compressed.

    Raises:
        PlmccError: it cannot be read.
    """
    check_packed(file)
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        reason = first_line(problem)
        raise error("PLM301", f"the file cannot be read: {reason}", str(file)) from None


def _aligned(
    table: Dataset,
    text: str | Sequence[str] | None,
    name: str,
    target: str | Sequence[str],
    base: Path | None,
) -> Dataset:
    """Join the rows of two sources, line by line."""
    other = target if isinstance(target, str) else ", ".join(target)
    second = read_table(target, base)
    columns = [_text_columns(part, text, n)[0] for part, n in ((table, name), (second, other))]
    if len(table) != len(second):
        given = f"{len(table)} rows in {name}, {len(second)} in {other}"
        hint = "line N of one file must be the translation of line N of the other"
        raise error("PLM301", "source and target are not aligned", other, got=given, hint=hint)
    return Dataset.from_dict({"source": table[columns[0]], "target": second[columns[1]]})


def data_files(source: str | Sequence[str], base: Path | None = None) -> list[Path]:
    """Return the local files that a source names; none for the hub and `synthetic`.

    Raises:
        PlmccError: a path or glob that names no file.
    """
    names = [source] if isinstance(source, str) else list(source)
    names = [name for name in names if name != SYNTHETIC and not name.startswith("hub:")]
    return [path for name in names for path in matching_files(name, base)]


def synthetic_rows(
    settings: Synthetic, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> Dataset:
    """Draw token sequences by Zipf's law over the vocabulary in the order of ids; the columns are
    the model's inputs.

    Special and unused tokens are left out, and added around each sequence as the tokenizer does.
    """
    ids = _plain_ids(vocab_size, tokenizer)
    weights = 1.0 / np.arange(1, len(ids) + 1) ** settings.exponent
    generator = np.random.default_rng(seed)
    drawn = generator.choice(ids, (settings.sequences, settings.length), p=weights / weights.sum())
    return Dataset.from_list([_framed(row.tolist(), tokenizer) for row in drawn])


def _plain_ids(vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> np.ndarray[Any, Any]:
    if tokenizer is None:
        return np.arange(vocab_size)
    special = set(tokenizer.all_special_ids)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    keep = [
        i
        for i in range(vocab_size)
        if i in tokens and i not in special and "[unused" not in tokens[i]
    ]
    return np.array(keep)


def _framed(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, list[int]]:
    if (
        tokenizer is not None
        and tokenizer.cls_token_id is not None
        and tokenizer.sep_token_id is not None
    ):
        ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    elif tokenizer is not None and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _from_hub(source: str) -> Dataset:
    name, _, split = source.removeprefix("hub:").partition("@")
    parts = name.split("/")
    config = parts[2] if len(parts) == 3 else None
    try:
        return load_dataset("/".join(parts[:2]), config, split=split or "train")
    except Exception as problem:  # the library raises many kinds, all with a usable text
        raise error(
            "PLM301", f"the dataset cannot be loaded: {first_line(problem)}", source
        ) from None


def rows_by_file(source: str | Sequence[str], base: Path | None = None) -> dict[str, int]:
    """Return how many rows each file has that a source names; what was read is not parsed again.

    Raises:
        PlmccError: as `load_rows` says.
    """
    files = data_files(source, base)
    if not files:
        return {}
    parts = zip(files, _parts(files), strict=True)
    return {str(file): len(part) for file, part in parts}


def _from_files(source: str | Sequence[str], base: Path | None) -> Dataset:
    return concatenate_datasets(_parts(data_files(source, base)))


def _parts(files: list[Path]) -> list[Dataset]:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        given = ", ".join(sorted(kinds))
        raise error("PLM301", "files of different kinds cannot be mixed", str(files[0]), got=given)
    for file in files:
        if file.stat().st_size == 0:
            raise error("PLM301", "the file is empty", str(file))
        check_packed(file)
        if _kind(file) in (".json", ".jsonl"):
            check_nested(file)
    return _read(kinds.pop(), files)


def _kind(file: Path) -> str:
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix in (".en", ".de", ".fr", ""):  # line-aligned text files of parallel corpora
        suffix = ".txt"
    if suffix not in _BUILDERS:
        raise error(
            "PLM301",
            f"data files of the type `{suffix}` are not supported",
            str(file),
            allowed=", ".join(_BUILDERS),
        )
    return suffix


@contextmanager
def _plain_names(paths: list[str]) -> Iterator[list[str]]:
    """Give links to files of which the library would take a part for a variable ($HOME)."""
    with tempfile.TemporaryDirectory(prefix="plmcc-data-") as folder:
        found = []
        for number, path in enumerate(paths):
            link = Path(folder) / f"{number}{''.join(Path(path).suffixes[-2:])}"
            if "$" in path:
                link.symlink_to(Path(path).resolve())
            found.append(str(link) if "$" in path else path)
        yield found


def _read(suffix: str, files: list[Path]) -> list[Dataset]:
    """Return the rows of each file."""
    options: Values = {}
    if suffix in (".tsv", ".csv"):
        found = [options_of(file, "\t" if suffix == ".tsv" else ",") for file in files]
        options = found[0]
        if any(other != options for other in found):
            message = "files with other encodings or delimiters cannot be mixed"
            raise error("PLM301", message, str(files[0]))
    elif suffix == ".txt":
        options = {"encoding": "utf-8-sig"}
    paths = [str(file) for file in files]
    # What the library logs of a file that it cannot read is said below, with its line.
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _plain_names(paths) as plain:
            names = [glob.escape(path) for path in plain]  # the library takes them for patterns
            # A split for each file: how many rows it has is told.
            splits = {f"file{number}": [name] for number, name in enumerate(names)}
            found = load_dataset(_BUILDERS[suffix], data_files=splits, **options)
            return [found[name] for name in splits if name in found]
    except Exception as problem:  # as above
        reason = problem.__cause__ or problem
        for file in files if suffix in (".json", ".jsonl") else ():
            _check_lines(file)
        if "corresponds to no data" in str(reason):
            raise error("PLM301", "there are no rows", ", ".join(paths)) from None
        raise error(
            "PLM301", f"the file cannot be read: {first_line(reason)}", ", ".join(paths)
        ) from None
    finally:
        logger.setLevel(level)


def _check_lines(file: Path) -> None:
    """Name the line of a JSON-lines file that is no JSON.

    Raises:
        PlmccError: there is one.
    """
    text = read_text(file)
    if file.name.removesuffix(".gz").endswith(".json") and text.lstrip().startswith(("[", "{\n")):
        return  # one value over several lines
    for number, line in enumerate(text.splitlines(), 1):
        try:
            json.loads(line.strip() or "{}")
        except ValueError as problem:
            message = f"this line is no JSON: {first_line(problem)}"
            raise error("PLM301", message, f"{file}:{number}") from None


def _text_columns(table: Dataset, text: str | Sequence[str] | None, source: str) -> tuple[str, ...]:
    names = table.column_names
    if text is not None:
        columns = (text,) if isinstance(text, str) else tuple(text)
        return tuple(existing(column, names, source) for column in columns)
    for pair in _PAIRS:
        if set(pair) <= set(names):
            return pair
    for single in _SINGLE:
        if single in names:
            return (single,)
    for chat in _CHATS:
        if chat in names and any(is_chat(value) for value in table[:_LOOKED_AT][chat]):
            return (chat,)
    raise error(
        "PLM301",
        "the text column is unknown",
        source,
        got=listing(names),
        allowed="one or two columns that `text:` names",
    )


def columns_of(table: Dataset, text: str | Sequence[str] | None, source: str) -> tuple[str, ...]:
    """Return the columns of text: those named, or the usual ones.

    Raises:
        PlmccError: one is not there, or does not hold text.
    """
    columns = _text_columns(table, text, source)
    _check_text(table, columns, source)
    return columns


def _check_text(table: Dataset, columns: Sequence[str], source: str) -> None:
    for column in columns:
        if len(columns) == 1 and any(is_chat(value) for value in table[:_LOOKED_AT][column]):
            continue
        if getattr(table.features[column], "dtype", "") in ("string", "large_string", "null"):
            continue
        values = enumerate(table[column], 1)
        row, value = next(((n, v) for n, v in values if not isinstance(v, str)), (0, "a number"))
        message = f"the column `{column}` does not contain text in row {row}"
        hint = "choose another one with `text:`"
        raise error("PLM301", message, source, got=repr(value)[:80], hint=hint)


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _label_column(table: Dataset, label: str | None, source: str) -> str | None:
    if label is not None:
        return existing(label, table.column_names, source)
    return next((name for name in _LABELS if name in table.column_names), None)


def _joined(table: Dataset, columns: Sequence[str], source: str, first: int) -> tuple[Dataset, str]:
    """Make one column of lists from columns of 0 and 1."""
    for column in columns:
        existing(column, table.column_names, source)
    lists: list[list[str]] = [[] for _ in range(len(table))]
    for column in columns:
        for row, value in enumerate(table[column]):
            if str(value).strip() not in _YES + _NO:
                place = f"line {row + first}" if first else f"row {row + 1}"
                message = f"the column `{column}` does not hold 0 or 1 in {place}"
                given, allowed = repr(value), "0 or 1"
                raise error("PLM302", message, source, got=given, allowed=allowed)
            if str(value).strip() in _YES:
                lists[row].append(column)
    name = ", ".join(columns)
    while name in table.column_names:
        name += "_"
    return table.add_column(name, lists), name


def existing(column: str, names: list[str], source: str) -> str:
    """Return the name of a column.

    Raises:
        PlmccError: there is none of that name.
    """
    if column not in names:
        hint = did_you_mean(column, names)
        raise error(
            "PLM301", f"there is no column `{column}`", source, allowed=listing(names), hint=hint
        )
    return column
