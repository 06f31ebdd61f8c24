"""What a model is for: its task, and the class that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from plmcc.data import question_answering, token_classification

_AUTO = {
    "sentence-similarity": "AutoModel",
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
    question_answering.TASK: "AutoModelForQuestionAnswering",
    token_classification.TASK: "AutoModelForTokenClassification",
}


_HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "translation",
    "MTModel": "translation",
}


# Endings would name models that read pictures too.
_CLASSES = dict.fromkeys(
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(), question_answering.TASK
) | dict.fromkeys(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(), token_classification.TASK)


EMBEDDING = ("sentence-similarity", "feature-extraction")
"""Tasks whose outputs are vectors of texts."""


WINDOWED = (question_answering.TASK, token_classification.TASK)
"""Tasks whose labels are places in a text, and whose texts are read in windows."""


GENERATION = "text-generation"
LANGUAGE = ("fill-mask", GENERATION, "translation")
"""Tasks whose outputs are tokens."""


LABELED = ("text-classification", *WINDOWED)
"""Tasks whose heads are made for labeled data."""


LABELS = ("labels", "start_positions", "end_positions")
"""What a batch holds for the loss of the task."""


def task_of(architecture: str, folder: Path | None = None) -> str:
    """Return the task that a checkpoint was made for, by its architecture; a sentence encoder has a
    modules.json."""
    if architecture in _CLASSES:
        return _CLASSES[architecture]
    for ending, task in _HEADS.items():
        if architecture.endswith(ending):
            return task
    if folder is not None and (folder / "modules.json").exists():
        return "sentence-similarity"
    return "feature-extraction"


def architecture_of(config: PreTrainedConfig) -> str:
    """Return the class that a checkpoint was saved from; empty if its config names none."""
    named = config.architectures
    return str(named[0]) if isinstance(named, list) and named else ""


def auto_class(task: str, config: PreTrainedConfig) -> Any:
    """Return the class to load with: the task's Auto class, or for plain features the checkpoint's
    own class."""
    name = architecture_of(config)
    architecture = own_class(name)
    own = task in ("feature-extraction", "translation") or name.endswith("EncoderModel")
    if own and architecture is not None:
        return architecture
    return getattr(transformers, _AUTO[task])


def own_class(name: str) -> type[PreTrainedModel] | None:
    """Return the model class of transformers with a name, or None: a config may name anything."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else None


def classes_of(model: PreTrainedModel) -> int:
    """Return the number of classes of the head."""
    return int(model.config.num_labels or 0)
