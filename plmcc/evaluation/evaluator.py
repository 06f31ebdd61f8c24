"""Figures of a model on data: task metrics through scikit-learn and scipy, perplexity, fidelity to
the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from plmcc.data import classification, question_answering, token_classification
from plmcc.data.collate import Collate, collator, padding
from plmcc.data.encoding import encode
from plmcc.data.pooling import Pooling, last_states
from plmcc.data.rows import Rows
from plmcc.data.tasks import WINDOWED, task_of
from plmcc.data.windows import Inputs, by_length
from plmcc.diagnostics import Location, error
from plmcc.inference.batches import generated
from plmcc.recipe.metrics import METRICS_OF_HEADS, METRICS_OF_TASKS, RANKING, is_of, library_of
from plmcc.utils.extras import library
from plmcc.utils.numerics import by_rows, divergence
from plmcc.utils.text import first_line

_BATCH = 64
_LOGITS = 2**27
"""Elements of the logits of a batch: half a gigabyte in float32."""
_FIRST = 10
"""Places that metrics of rankings look at."""
_TRANSLATION = ("bleu", "chrf")
_CLASSES: dict[str, Callable[[list[int], list[int]], float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": lambda truth, found: metrics.f1_score(
        truth, found, average="binary" if max(truth) < 2 else "macro"
    ),
    "matthews": metrics.matthews_corrcoef,
    "f1_micro": lambda truth, found: metrics.f1_score(truth, found, average="micro"),
    "f1_macro": lambda truth, found: metrics.f1_score(truth, found, average="macro"),
}
_LABELS: dict[str, Callable[[object, object], float]] = {
    "accuracy": metrics.accuracy_score,  # of rows whose labels are all right
    "f1": lambda truth, found: metrics.f1_score(truth, found, average="micro", zero_division=0.0),
    "f1_micro": lambda truth, found: metrics.f1_score(
        truth, found, average="micro", zero_division=0.0
    ),
    "f1_macro": lambda truth, found: metrics.f1_score(
        truth, found, average="macro", zero_division=0.0
    ),
}
_CORRELATIONS: dict[str, Callable[[object, object], object]] = {
    "spearman": stats.spearmanr,
    "pearson": stats.pearsonr,
}


def check_metric(
    metric: str,
    task: str,
    location: Location | str = "evaluate",
    config: PreTrainedConfig | None = None,
) -> None:
    """Check that a metric is one of the task's, and of what the head predicts.

    Raises:
        PlmccError: it is not.
    """
    allowed, of = METRICS_OF_TASKS[task], task
    if task == classification.TASK and config is not None:
        kind = classification.kind_of(config)
        allowed, of = METRICS_OF_HEADS[kind], classification.HEADS[kind]
    if not (is_of(metric, task) if library_of(metric) else metric in allowed):
        message = f"{metric} is not a metric of {of}"
        raise error("PLM303", message, location, got=metric, allowed=", ".join(allowed))


class Evaluator:
    """Computes metrics of one model. `original` is what `fidelity` compares with, which may have
    another tokenizer: vectors of texts, classes, answers and labels are compared, whatever tokens
    they were made from. Only of language models are tokens compared."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        original: PreTrainedModel | None = None,
        max_length: int = 128,
        num_beams: int = 4,
        max_new_tokens: int = 128,
        original_tokenizer: PreTrainedTokenizerBase | None = None,
        window: tuple[int, int] | None = None,
    ) -> None:
        self.search = (num_beams, max_new_tokens)
        self.model, self.tokenizer = model.eval(), padding(tokenizer)
        self.pooling, self.original = pooling, original
        self.original_tokenizer = original_tokenizer or tokenizer
        self.window = window
        """Length and stride in tokens, where texts are joined."""
        self.max_length, self.task = max_length, task_of(type(model).__name__)
        self.kind = classification.kind_of(model.config)
        head = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        vocabulary = 0 if head is None else int(getattr(config, "vocab_size", 0))
        self._tokens = _LOGITS // vocabulary if vocabulary else math.inf
        """Tokens of a batch, where each has logits for the whole vocabulary."""

    @torch.no_grad()
    def compute(self, metric: str, rows: Rows) -> float:
        """Return a metric; correlations, accuracies and fidelity are in percent, perplexity is per
        token, kl_divergence in nats a prediction.

        Raises:
            PlmccError: the rows or the model do not have what the metric needs.
        """
        check_metric(metric, self.task, config=self.model.config)
        if self.task in WINDOWED:
            return 100 * self._windowed(metric, rows)
        if metric in RANKING:
            return 100 * self._ranking(metric, rows)
        if metric == "mse":
            return float(metrics.mean_squared_error(rows.numbers(), self.judge(rows)))
        if metric in _CORRELATIONS:
            return 100 * self._correlation(_CORRELATIONS[metric], rows)
        if self.kind == "labels" and metric in _LABELS:
            truths = classification.label_sets(rows, self.model.config)
            return 100 * float(_LABELS[metric](truths, self.judge(rows) > 0))
        if metric in _CLASSES:
            return 100 * self._classification(_CLASSES[metric], rows)
        if metric == "perplexity":
            return self._perplexity(rows)
        if metric in _TRANSLATION:
            return self._translation(metric, rows)
        if metric == "kl_divergence":
            return self._divergence(rows)
        assert metric == "fidelity", metric
        return 100 * self._fidelity(rows)

    def translate(self, texts: list[str]) -> list[str]:
        """Return translations, by beam search."""
        options = {"truncation": True, "max_length": self.max_length}
        sources = self.tokenizer(texts, **options)["input_ids"]
        found = generated(self.model, sources, *self.search)
        return list(self.tokenizer.batch_decode(found, skip_special_tokens=True))

    def _translation(self, metric: str, rows: Rows) -> float:
        """Corpus BLEU or chrF by sacreBLEU's defaults, on detokenized text."""
        if len(rows.text) != 2:
            raise error(
                "PLM301",
                f"{metric} needs reference translations",
                rows.source,
                hint="add `target:` with the translations",
            )
        if not self.model.config.is_encoder_decoder:
            raise error(
                "PLM303",
                f"{metric} needs a translation model",
                "evaluate",
                got=type(self.model).__name__,
            )
        sacrebleu = library("sacrebleu", "eval", "this metric", "evaluate")
        compute = sacrebleu.corpus_bleu if metric == "bleu" else sacrebleu.corpus_chrf
        return float(compute(self.translate(rows.texts(0)), [rows.texts(1)]).score)

    def _reference(self) -> Evaluator:
        """The same of the original, with its own tokenizer."""
        assert self.original is not None, "fidelity compares with the original"
        given = (self.original, self.original_tokenizer, self.pooling, None, self.max_length)
        return Evaluator(*given)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Return one vector a text (N, D), float32, as the model's own pooling makes it."""
        parts: list[tuple[list[int], Tensor]] = []
        for order, batch in self._batches(texts):
            output = self.model(**batch, output_hidden_states=True)
            parts.append((order, self.pooling(last_states(output), batch["attention_mask"]).cpu()))
        return _restored(parts, len(texts))

    def judge(self, rows: Rows) -> Tensor:
        """Return the logits of rows (N, classes), or (N) of one number; float32."""
        return self.logits([rows.texts(column) for column in range(len(rows.text))])

    @torch.no_grad()
    def logits(self, columns: Sequence[list[str]]) -> Tensor:
        """As `judge`, of texts or of pairs of texts."""
        batches = self._batches(*columns)
        parts = [(order, self._logits(batch).float().cpu()) for order, batch in batches]
        return _restored(parts, len(columns[0])).squeeze(-1)

    def _batches(
        self, *texts: list[str], special: bool = True
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of texts of similar length, with the positions they come from."""
        options = {"truncation": True, "max_length": self.max_length}
        try:
            encoded = self.tokenizer(*texts, **options, add_special_tokens=special)
        except Exception as problem:  # of the tokenizers library, which has no other class
            message = f"the tokenizer cannot read the texts: {first_line(problem)}"
            hint = "leave out words without a vector, as `plmcc vectors evaluate` does"
            raise error("PLM302", message, "evaluate", hint=hint) from problem
        pad = collator("feature-extraction", self.tokenizer)
        yield from self._padded({name: list(column) for name, column in encoded.items()}, pad)

    def _padded(
        self, inputs: Inputs, pad: Collate
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        lengths = [len(ids) for ids in inputs["input_ids"]]
        for order in by_length(lengths, _BATCH, self._tokens):
            batch = pad([{name: column[i] for name, column in inputs.items()} for i in order])
            yield order, {name: value.to(self.model.device) for name, value in batch.items()}

    @torch.no_grad()
    def predict(self, rows: Rows) -> list[Any]:
        """Return the answer to each question, or the labels of the words of each sentence."""
        given = (rows, self.tokenizer, self.max_length)
        if self.task == question_answering.TASK:
            inputs, made = question_answering.question_windows(*given)
            return question_answering.best_answers(rows, made, self._outputs(inputs))
        inputs, made, begun = token_classification.sentence_windows(*given)
        outputs = self._outputs(inputs)
        return token_classification.best_labels(rows, made, begun, outputs)

    def _outputs(self, inputs: Inputs) -> Iterator[tuple[list[int], object]]:
        """What the model returns for windows, batch by batch, with the places of these."""
        for order, batch in self._padded(inputs, collator(self.task, self.tokenizer)):
            yield order, self.model(**batch)

    def _windowed(self, metric: str, rows: Rows) -> float:
        """Figures of answers or of labeled words."""
        found = self.predict(rows)
        if metric == "fidelity":
            return _same(found, self._reference().predict(rows))
        if self.task == question_answering.TASK:
            answers = question_answering.answers_of(rows)
            return question_answering.squad(metric, found, [[a.text for a in o] for o in answers])
        names = self.model.config.label2id
        truths = token_classification.label_ids(rows, names)
        if metric == "accuracy":
            return _same(truths, found)
        return token_classification.entity_f1(truths, found, names)

    def _ranking(self, metric: str, rows: Rows) -> float:
        """The mean over queries, each with at least one relevant text and one more: nDCG@10 with
        linear gains (Järvelin and Kekäläinen 2002), or the reciprocal rank of the first relevant
        text, 0 beyond the tenth place."""
        _need_pairs(rows, metric, "a query and a text")
        labels, scores = np.array(rows.numbers()), self._scores(rows).numpy()
        if (labels < 0).any():
            message = f"{metric} needs labels from 0 on: how relevant a text is"
            raise error("PLM302", message, rows.source, got=f"{labels.min():g}")
        if np.isnan(scores).any():
            return math.nan
        found = []
        for group in rows.groups().values():
            truth, score = labels[group], scores[group]
            if len(group) < 2 or not truth.max() > 0:
                continue
            if metric == "ndcg":
                found.append(metrics.ndcg_score([truth], [score], k=_FIRST))
            else:
                best = score[truth > 0].max()
                place = 1 + int((score[truth <= 0] >= best).sum())  # ties are no help
                found.append(1 / place if place <= _FIRST else 0.0)
        if not found:
            message = "no query has a relevant text (a label above 0) and another one"
            hint = "the first column of text holds the query, the second a text"
            raise error("PLM302", message, rows.source, hint=hint)
        return float(np.mean(found))

    def _scores(self, rows: Rows) -> Tensor:
        """How well the two texts of each row go together (N)."""
        if self.task == classification.TASK:
            return self.judge(rows)
        first, second = (self.embed(rows.texts(column)) for column in (0, 1))
        return self.pooling.similarity(first, second)

    def _correlation(self, measure: Callable[[object, object], Any], rows: Rows) -> float:
        if self.task != classification.TASK:
            _need_pairs(rows, "a correlation", "text")
        labels = rows.numbers()
        return float(measure(self._scores(rows).numpy(), labels)[0])

    def _classification(
        self, measure: Callable[[list[int], list[int]], float], rows: Rows
    ) -> float:
        config = self.model.config
        labels = classification.class_labels(rows, int(config.num_labels or 0), config.label2id)
        return float(measure(labels, self.judge(rows).argmax(-1).tolist()))

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(**batch).get("logits")
        if logits is None or logits.dim() != 2:
            raise error(
                "PLM303",
                "this metric needs a classification head",
                "evaluate",
                hint="set `task: text-classification`",
            )
        return logits  # type: ignore[no-any-return]

    def _perplexity(self, rows: Rows) -> float:
        """exp of the mean loss of each next token, or of tokens that are masked at random."""
        total, tokens = 0.0, 0
        for batch, targets_BL in self._next_tokens(rows):
            logits_BLV = self.model(**batch).logits[:, : targets_BL.shape[1]]
            tokens += int((targets_BL != -100).sum())
            for logits_NV, targets_N in by_rows(logits_BLV.flatten(0, 1), targets_BL.flatten()):
                total += float(F.cross_entropy(logits_NV.float(), targets_N, reduction="sum"))
        return _exp(total / max(1, tokens))

    def _next_tokens(self, rows: Rows) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches, and what is to be predicted at each place: what comes next, or what is masked
        (-100: nothing)."""
        if self.model.config.is_encoder_decoder:
            yield from ((batch, batch["labels"]) for batch in self._forced(rows))
            return
        if self.task == "fill-mask":
            encoded = self.tokenizer(rows.texts(), truncation=True, max_length=self.max_length)
            columns = {name: list(column) for name, column in encoded.items()}
            for _, batch in self._padded(columns, collator(self.task, self.tokenizer)):
                yield batch, batch.pop("labels")
            return
        if self.window is not None:
            yield from self._windows(rows)
            return
        for _, batch in self._batches(rows.texts(), special=not rows.verbatim):
            padding_BL = batch["attention_mask"][:, 1:] == 0
            yield batch, batch["input_ids"][:, 1:].masked_fill(padding_BL, -100)

    def _windows(self, rows: Rows) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Windows of the joined texts, and what is to be predicted (-100: what was counted in the
        window before). Each begins with the token that the tokenizer puts before a text."""
        assert self.window is not None
        length, stride = self.window
        text = "\n".join(rows.texts())
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        begins = start is not None and self.tokenizer(text[:1])["input_ids"][:1] == [start]
        first, size = ([start], length - 1) if begins else ([], length)
        stride = min(stride, size)
        if len(ids) < 2:
            message = "there is nothing to predict in the text"
            raise error("PLM302", message, rows.source, got=f"{len(ids)} tokens")
        windows: list[list[int]] = []
        counted: list[int] = []
        done = 0
        while done < len(ids):
            end = min(max(done + stride, size), len(ids))
            windows.append([*first, *ids[max(0, end - size) : end]])
            counted.append(end - done)
            done = end
        inputs = {"input_ids": windows, "attention_mask": [[1] * len(one) for one in windows]}
        for order, batch in self._padded(inputs, collator("feature-extraction", self.tokenizer)):
            targets_BL = torch.full_like(batch["input_ids"], -100)
            for row, index in enumerate(order):
                last = int(batch["attention_mask"][row].nonzero()[-1]) + 1
                new = slice(last - counted[index], last)
                targets_BL[row, new] = batch["input_ids"][row, new]
            yield batch, targets_BL[:, 1:]

    def _forced(self, rows: Rows) -> Iterator[dict[str, Tensor]]:
        """Batches of sources and references, as the decoder is trained on them."""
        if len(rows.text) != 2:
            raise error(
                "PLM301",
                "this metric needs reference translations",
                rows.source,
                hint="add `target:` with the translations",
            )
        pad = collator("translation", self.tokenizer, self.model.config)
        table = encode(rows, "translation", self.tokenizer, self.max_length)
        columns = {name: table[name][:] for name in table.column_names}
        yield from (batch for _, batch in self._padded(columns, pad))

    def _token_fidelity(self, rows: Rows) -> float:
        assert self.original is not None
        same, tokens = 0, 0
        for batch in self._forced(rows):
            real_BL = batch["labels"] != -100
            mine, theirs = (m(**batch).logits.argmax(-1) for m in (self.model, self.original))
            same += int((mine == theirs)[real_BL].sum())
            tokens += int(real_BL.sum())
        return same / max(1, tokens)

    def _fidelity(self, rows: Rows) -> float:
        """With a head, the share of equal predictions (of a number, the coefficient of
        determination R²); without one, the mean cosine of pooled outputs with the original's. Of
        translations, the share of tokens that both would choose next after the beginning of the
        reference."""
        if self.model.config.is_encoder_decoder:
            return self._token_fidelity(rows)
        if self.task == classification.TASK:
            mine_N, theirs_N = (one.judge(rows) for one in (self, self._reference()))
            if self.kind == "number":
                return max(0.0, float(metrics.r2_score(theirs_N, mine_N)))
            if self.kind == "labels":
                return float(((mine_N > 0) == (theirs_N > 0)).float().mean())
            return float((mine_N.argmax(-1) == theirs_N.argmax(-1)).float().mean())
        if self.model.get_output_embeddings() is None and self.model.base_model is self.model:
            texts = [text for column in range(len(rows.text)) for text in rows.texts(column)]
            mine, theirs = (one.embed(texts) for one in (self, self._reference()))
            return float(F.cosine_similarity(mine, theirs, dim=-1).mean())
        agreements: list[Tensor] = []
        for batch, real_BL in self._with_real(rows):
            mine, theirs = (self._states(m, batch, real_BL) for m in (self.model, self.original))
            same = (
                F.cosine_similarity(mine, theirs, dim=-1)
                if mine.is_floating_point()
                else (mine == theirs).float()
            )
            agreements.append(same.cpu())
        return float(torch.cat(agreements).mean())

    def _divergence(self, rows: Rows) -> float:
        """Mean KL(original || model) over predictions: of classes, or of tokens that are not
        padding; of translations, of each next token after the beginning of the reference."""
        assert self.original is not None, "kl_divergence compares with the original"
        if self.task == classification.TASK:
            mine_NC, theirs_NC = (one.judge(rows) for one in (self, self._reference()))
            return float(divergence(theirs_NC, mine_NC, self.kind == "labels").mean())
        total, count = 0.0, 0
        for batch, real in self._with_real(rows):
            outputs = [m(**batch).get("logits") for m in (self.original, self.model)]
            if outputs[0] is None:
                raise error(
                    "PLM303",
                    "kl_divergence needs a head, but the model has none",
                    "evaluate",
                    hint="use `fidelity`",
                )
            flat = [logits.flatten(0, -2) for logits in outputs]
            count += int(real.sum())
            for *pair, real_N in by_rows(*flat, real.flatten()):
                theirs_NV, mine_NV = (part[real_N].float() for part in pair)
                total += float(divergence(theirs_NV, mine_NV, self.kind == "labels").sum())
        return total / max(1, count)

    def _with_real(self, rows: Rows) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Batches, and where there is something to predict in them."""
        if self.model.config.is_encoder_decoder:
            yield from ((batch, batch["labels"] != -100) for batch in self._forced(rows))
            return
        if self.window is not None:
            for batch, targets_BL in self._windows(rows):
                last_B1 = torch.zeros_like(targets_BL[:, :1], dtype=torch.bool)
                yield batch, torch.cat([targets_BL != -100, last_B1], 1)
            return
        columns = [rows.texts(column) for column in range(len(rows.text))]
        for _, batch in self._batches(*columns, special=not rows.verbatim):
            yield batch, batch["attention_mask"].bool()

    def _states(
        self, model: PreTrainedModel | None, batch: dict[str, Tensor], real_BL: Tensor
    ) -> Tensor:
        """The predicted tokens; where there is no head for them, pooled outputs (B, D)."""
        assert model is not None, "fidelity compares with the original"
        output = model(**batch, output_hidden_states=True)
        logits: Tensor | None = output.get("logits")
        if logits is None:
            return self.pooling(last_states(output), batch["attention_mask"])
        return logits.argmax(-1)[real_BL]


def _need_pairs(rows: Rows, what: str, of: str) -> None:
    if len(rows.text) != 2:
        message = f"{what} needs two columns of {of}" if of == "text" else f"{what} needs {of}"
        hint = "name the columns with `text:`"
        raise error("PLM301", message, rows.source, hint=hint)


def _same(one: list[Any], two: list[Any]) -> float:
    """The share of equal answers, or of equal labels of words."""
    if one and isinstance(one[0], list):
        one, two = ([label for row in part for label in row] for part in (one, two))
    return float(np.mean([a == b for a, b in zip(one, two, strict=True)]))


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def _restored(parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:
    order = torch.tensor([index for part, _ in parts for index in part])
    values = torch.cat([value for _, value in parts])
    result = torch.empty((count, *values.shape[1:]), dtype=values.dtype)
    result[order] = values
    return result
