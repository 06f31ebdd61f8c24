"""Training with the real Trainer on tiny models, and the data it reads."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from plmcc import Data, Distill, PlmccError, Train, rewrite
from plmcc.api import Objective
from plmcc.data.collate import collator
from plmcc.data.encoding import encode
from plmcc.data.pooling import Pooling
from plmcc.data.rows import load_rows, synthetic_rows
from plmcc.kit.tables import LearningRate
from plmcc.passes.compositional_codes import CompositionalCodes
from plmcc.recipe.load import Synthetic
from plmcc.recipe.training_arguments import checkpoints_activations
from plmcc.rewrite import Replacement
from plmcc.training.distillation import Distillation, relative_error
from plmcc.training.loop import TrainingData, train
from support.tiny_models import VOCAB, tiny
from support.tokenizers import words

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*:UserWarning", "ignore:.*pin_memory.*:UserWarning"
)


def config(**options: Any) -> Any:
    values = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2} | options
    return transformers.BertConfig(
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **values,
    )


def encoder(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any = transformers.BertModel(config(**options), add_pooling_layer=False)
    return evaluating(model)


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return evaluating(transformers.BertForSequenceClassification(config(num_labels=2)))


def evaluating(model: Any) -> PreTrainedModel:
    model.train(False)
    assert isinstance(model, PreTrainedModel)
    return model


def coded(model: PreTrainedModel, **options: Any) -> list[Replacement]:
    chosen = CompositionalCodes(codebooks=2, codewords=8, beam=2, rounds=1, **options)
    return rewrite.replace_all(model, rewrite.match(model, [chosen]))


def sentences(count: int = 8) -> Dataset:
    """Sequences of different lengths, without padding."""
    lengths = [4 + 3 * (row % 3) for row in range(count)]
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCAB, (n,), generator=random).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * n for n in lengths]})


def training_data(task: str, rows: Dataset | None = None, **options: Any) -> TrainingData:
    return TrainingData(task, rows or sentences(), collator(task, words()), **options)


def settings(**options: Any) -> Train:
    arguments = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    } | options.pop("arguments", {})
    return Train(data=Data(train="synthetic"), arguments=arguments, **options)


def losses(log: Sequence[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: PreTrainedModel) -> set[str]:
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def refused(*arguments: Any) -> Any:
    with pytest.raises(PlmccError) as caught:
        train(*arguments)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def batch_of(given: TrainingData) -> dict[str, Tensor]:
    return given.collate([given.train[row] for row in range(len(given.train))])


# --- distillation


@pytest.mark.parametrize(
    ("task", "weights"),
    [
        ("sentence-similarity", {"hidden_states": 1.0}),
        ("sentence-similarity", {"pooled": 1.0}),
        ("feature-extraction", {"hidden_states": 1.0, "pooled": 1.0}),
        ("text-classification", {"logits": 1.0, "temperature": 4.0}),
        ("fill-mask", {"logits": 1.0, "task": 0.0}),
        ("text-generation", {"logits": 1.0, "hidden_states": 0.5, "task": 0.5}),
    ],
    ids=str,
)
def test_distillation_lowers_the_loss(task: str, weights: dict[str, Any]) -> None:
    models: dict[str, Callable[[], PreTrainedModel]]
    models = {"text-classification": classifier, "fill-mask": lambda: tiny("bert")}
    models["text-generation"] = lambda: tiny("gpt2")
    model = models.get(task, encoder)()
    teacher = copy.deepcopy(model)
    done = coded(model)
    log = losses(
        train(
            model, settings(distill=Distill(**weights)), training_data(task, teacher=teacher), done
        )
    )
    assert sum(log[-3:]) < 0.9 * sum(log[:3])
    assert not model.training


def first_loss(distill: Distill, model: PreTrainedModel, given: TrainingData) -> float:
    once = settings(distill=distill, arguments={"max_steps": 1})
    return losses(train(model, once, given, []))[0]


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        (None, [(0, 0), (1, 2), (2, 4)]),
        ({2: 1}, [(2, 1)]),
        ({0: 3, 1: 2}, [(0, 3), (1, 2)]),
    ],
)
def test_hidden_states_are_compared_as_mapped(
    layers: dict[int, int] | None, pairs: list[tuple[int, int]]
) -> None:
    model, teacher = encoder(), encoder(num_hidden_layers=4)
    given = training_data("feature-extraction", teacher=teacher)
    batch = batch_of(given)
    with torch.no_grad():
        mine, theirs = (
            m(**batch, output_hidden_states=True).hidden_states for m in (model, teacher)
        )
    mask = batch["attention_mask"].bool()
    expected = 0.0
    for s, t in pairs:
        error = (mine[s] - theirs[t])[mask].square().sum() / theirs[t][mask].square().sum()
        expected += 2.0 * float(error) / len(pairs)
    found = first_loss(Distill(hidden_states=2.0, layers=layers), model, given)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_pooled_vectors_are_compared_by_cosine(pooling: str) -> None:
    model, teacher = encoder(), encoder(num_hidden_layers=3)
    given = training_data("feature-extraction", teacher=teacher, pooling=Pooling(pooling))
    rows, cosines = given.train, []
    for row in range(len(rows)):
        ids = torch.tensor([rows[row]["input_ids"]])
        with torch.no_grad():
            states = [m(ids).last_hidden_state[0] for m in (model, teacher)]
        reduced = {"mean": lambda s: s.mean(0), "cls": lambda s: s[0], "max": lambda s: s.amax(0)}[
            pooling
        ]
        one, two = map(reduced, states)
        cosines.append(float(F.cosine_similarity(one, two, dim=0)))
    expected = 3.0 * (1 - sum(cosines) / len(cosines))
    assert first_loss(Distill(pooled=3.0), model, given) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_logits_are_compared_at_a_temperature(temperature: float) -> None:
    model, teacher = classifier(), classifier()
    teacher.get_submodule("classifier").weight.data.normal_(  # type: ignore[operator]
        generator=torch.Generator().manual_seed(3)
    )
    given = training_data("text-classification", teacher=teacher)
    with torch.no_grad():
        q, p = ((m(**batch_of(given)).logits / temperature).softmax(-1) for m in (model, teacher))
    expected = float((p * (p / q).log()).sum(-1).mean()) * temperature**2
    found = first_loss(Distill(logits=1.0, temperature=temperature), model, given)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_logits_of_tokens_leave_padding_out(temperature: float) -> None:
    model, teacher = tiny("gpt2"), tiny("gpt2")
    teacher.get_submodule("transformer.ln_f").weight.data.mul_(2)  # type: ignore[operator]
    given = training_data("text-generation", teacher=teacher)
    batch = batch_of(given)
    with torch.no_grad():
        q, p = ((m(**batch).logits / temperature).softmax(-1) for m in (model, teacher))
    divergence = (p * (p / q).log()).sum(-1)[batch["attention_mask"].bool()].mean()
    distill = Distill(logits=1.0, temperature=temperature, task=0.0)
    found = first_loss(distill, model, given)
    assert found == pytest.approx(float(divergence) * temperature**2, rel=1e-3)


def test_a_model_follows_itself_without_loss() -> None:
    distill = Distill(hidden_states=1.0, pooled=1.0)
    given = training_data("feature-extraction", teacher=encoder())
    assert first_loss(distill, encoder(), given) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_can_be_switched_off(dropout: bool) -> None:
    model = encoder()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    once = settings(distill=Distill(hidden_states=1.0), dropout=dropout, arguments={"max_steps": 1})
    given = training_data("feature-extraction", teacher=copy.deepcopy(model))
    (found,) = losses(train(model, once, given, []))
    assert (found > 0.01) is dropout
    assert found == pytest.approx(0, abs=1e-6) or dropout


def test_dropout_off_and_checkpointing_contradict() -> None:
    chosen = settings(
        distill=Distill(pooled=1.0), dropout=False, arguments={"gradient_checkpointing": True}
    )
    found = refused(encoder(), chosen, training_data("feature-extraction", teacher=encoder()), [])
    assert (found.code, found.location) == ("PLM303", "train.dropout")


def test_activations_are_computed_again_by_either_name() -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert checkpoints_activations({name: True}) == name
        assert checkpoints_activations({name: False}) is None


def test_relative_error_leaves_padding_out() -> None:
    one, two = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    before = relative_error(one, two, mask)
    one[mask == 0], two[mask == 0] = 1e6, -1e6
    assert torch.equal(relative_error(one, two, mask), before)
    assert float(relative_error(5 * one, 5 * two, mask)) == pytest.approx(float(before))


@pytest.mark.parametrize(
    ("teacher", "distill", "words_"),
    [
        (
            {"num_hidden_layers": 3},
            {"hidden_states": 1.0},
            "2 student layers cannot be mapped evenly to 3",
        ),
        ({}, {"hidden_states": 1.0, "layers": {3: 1}}, "a layer that does not exist"),
        ({}, {"hidden_states": 1.0, "layers": {1: 3}}, "a layer that does not exist"),
        ({"hidden_size": 48}, {"hidden_states": 1.0}, "the same size"),
        ({}, {"logits": 1.0}, "no logits"),
    ],
)
def test_a_teacher_that_does_not_fit(
    teacher: dict[str, int], distill: dict[str, Any], words_: str
) -> None:
    given = training_data("sentence-similarity", teacher=encoder(**teacher))
    found = refused(encoder(), settings(distill=Distill(**distill)), given, [])
    assert found.code == "PLM303"
    assert words_ in found.message
    assert "train.distill" in str(found.location)


def test_logits_of_another_shape() -> None:
    torch.manual_seed(0)
    teacher = transformers.BertForSequenceClassification(config(num_labels=3))
    given = training_data("text-classification", teacher=teacher)
    found = refused(classifier(), settings(distill=Distill(logits=1.0)), given, [])
    assert (found.code, found.got) == ("PLM303", "LABEL_0, LABEL_1, LABEL_2")
    assert found.allowed == "LABEL_0, LABEL_1"


def test_labels_of_a_teacher_are_matched_by_name() -> None:
    """The same function with its classes in another order: there is nothing to learn."""
    torch.manual_seed(0)
    names = {0: "bad", 1: "good", 2: "neutral"}
    student: Any = transformers.BertForSequenceClassification(config(num_labels=3, id2label=names))
    teacher = copy.deepcopy(student)
    order = [2, 0, 1]
    teacher.config.id2label = {i: names[j] for i, j in enumerate(order)}
    teacher.classifier.weight.data = student.classifier.weight.data[order]
    teacher.classifier.bias.data = student.classifier.bias.data[order]
    chosen = Distill(logits=1.0)
    distill = Distillation(student, teacher, chosen, Pooling(), "text-classification")
    batch = {"input_ids": torch.randint(5, 90, (4, 6)), "attention_mask": torch.ones(4, 6)}
    with torch.no_grad():
        outputs = [m.eval()(**batch) for m in (student, teacher)]
        assert float(distill.loss(batch, *outputs)) < 1e-6
    teacher.config.id2label = {0: "bad", 1: "fine", 2: "neutral"}
    with pytest.raises(PlmccError, match=r"other labels(.|\n)*got: bad, fine, neutral"):
        Distillation(student, teacher, chosen, Pooling(), "text-classification")


# --- what moves


def test_codes_stay_and_codebooks_move() -> None:
    model = encoder()
    teacher, done = copy.deepcopy(model), coded(model)
    before = state(model)
    train(
        model,
        settings(distill=Distill(hidden_states=1.0)),
        training_data("feature-extraction", teacher=teacher),
        done,
    )
    moved = changed(before, model)
    assert "embeddings.word_embeddings.hard.codebooks" in moved
    assert "embeddings.word_embeddings.hard.codes" not in moved
    assert len(moved) == len(list(model.parameters()))
    assert all(value.requires_grad for value in model.parameters())
    assert changed(state(encoder()), teacher) == set(), "the teacher learned"


def test_only_passes_are_trained_if_asked() -> None:
    model = tiny("bert")
    teacher, done = copy.deepcopy(model), coded(model)
    frozen = model.get_submodule("bert.encoder.layer.0.output.dense").requires_grad_(False)
    before = state(model)
    train(
        model,
        settings(distill=Distill(logits=1.0, task=0.0), trainable="passes"),
        training_data("fill-mask", teacher=teacher),
        done,
    )
    assert changed(before, model) == {"bert.embeddings.word_embeddings.hard.codebooks"}
    kept = {id(value) for value in frozen.parameters()}
    assert all(value.requires_grad != (id(value) in kept) for value in model.parameters())


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "fill-mask"), ("gpt2", "text-generation"), ("llama", "text-generation")],
)
def test_training_leaves_the_configuration_as_it_was(name: str, task: str) -> None:
    model: Any = tiny(name)
    before = copy.deepcopy(model.config.to_dict())
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    train(model, settings(arguments={"max_steps": 2}), training_data(task), [])
    assert model.config.to_dict() == before
    assert getattr(model, "generation_config", None) == generation


def test_training_only_passes_needs_parameters_of_passes() -> None:
    chosen = settings(distill=Distill(pooled=1.0), trainable="passes")
    found = refused(encoder(), chosen, training_data("feature-extraction", teacher=encoder()), [])
    assert (found.code, found.location) == ("PLM303", "train.trainable")


def test_a_failed_training_thaws_what_it_froze() -> None:
    model = encoder()
    done = [replace(done, objective=Broken()) for done in coded(model)]
    chosen = settings(distill=Distill(pooled=1.0), trainable="passes")
    refused(model, chosen, training_data("feature-extraction", teacher=encoder()), done)
    assert all(value.requires_grad for value in model.parameters())


def test_the_seed_decides() -> None:
    results = []
    for seed in (1, 1, 2):
        model = encoder()
        teacher, done = copy.deepcopy(model), coded(model)
        given = training_data("feature-extraction", sentences(32), teacher=teacher, seed=seed)
        log = train(model, settings(distill=Distill(pooled=1.0)), given, done)
        results.append((losses(log), state(model)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


@pytest.mark.parametrize("labeled", [True, False])
def test_accumulated_steps_are_averaged(labeled: bool) -> None:
    teacher = classifier()
    teacher.get_submodule("classifier").weight.data.mul_(-20)  # type: ignore[operator]
    rows = synthetic_rows(Synthetic(sequences=16, length=6), VOCAB, words(), 0)
    if labeled:
        rows = rows.add_column("labels", [row % 2 for row in range(16)])

    def trained(**arguments: int) -> PreTrainedModel:
        model = classifier()
        given = training_data("text-classification", rows, teacher=teacher)
        sgd = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.3}
        train(model, settings(distill=Distill(logits=1.0), arguments=sgd | arguments), given, [])
        return model

    whole = trained(per_device_train_batch_size=8)
    parts = trained(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    start = dict(classifier().named_parameters())
    moved = [
        float((value - start[n]).detach().abs().max()) for n, value in whole.named_parameters()
    ]
    assert max(moved) > 1e-2
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# --- objectives


@dataclass
class Recorder(Objective):
    """Pulls the codebooks to zero, and remembers what it was told."""

    soft: Any
    learning_rate: float | None = None
    clock: list[float] = field(default_factory=list)
    calls: list[tuple[int, bool]] = field(default_factory=list)

    def advance(self, progress: float) -> None:
        self.clock.append(progress)

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any | None) -> Tensor:
        self.calls.append((len(batch["input_ids"]), teacher is not None))
        codebooks: Tensor = self.soft.hard.codebooks
        return codebooks.square().sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.learning_rate is None:
            return []
        return [{"params": [self.soft.hard.codebooks], "lr": self.learning_rate}]


@dataclass
class Broken(Objective):
    """Not a number at its third step."""

    steps: int = 0

    def loss(self, batch: dict[str, Tensor], output: Any, teacher: Any | None) -> Tensor:
        self.steps += 1
        return torch.tensor(float("nan" if self.steps == 3 else 0.0))


def recorded(model: PreTrainedModel, **options: Any) -> tuple[Recorder, list[Replacement]]:
    (done,) = coded(model)
    recorder = Recorder(done.soft, **options)
    return recorder, [replace(done, objective=recorder)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_clock_runs_from_zero_to_one(accumulation: int) -> None:
    model = encoder()
    recorder, done = recorded(model)
    chosen = settings(
        distill=Distill(pooled=1.0),
        arguments={"max_steps": 5, "gradient_accumulation_steps": accumulation},
    )
    train(
        model, chosen, training_data("feature-extraction", sentences(48), teacher=encoder()), done
    )
    assert recorder.clock == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert recorder.calls == [(8, True)] * 5 * accumulation


def test_the_loss_of_an_objective_counts() -> None:
    model = encoder()
    recorder, done = recorded(model)
    before = float(recorder.soft.hard.codebooks.detach().square().sum())
    log = losses(
        train(
            model,
            settings(distill=Distill(pooled=1e-9)),
            training_data("feature-extraction", teacher=encoder()),
            done,
        )
    )
    assert log[0] == pytest.approx(before, rel=1e-4)
    assert log[-1] < 0.5 * log[0]


def test_an_objective_may_have_its_own_learning_rate() -> None:
    """The first step of Adam is as long as the learning rate."""
    model = encoder()
    recorder, done = recorded(model, learning_rate=0.03)
    codebooks, other = (
        recorder.soft.hard.codebooks,
        model.get_parameter("encoder.layer.0.output.dense.weight"),
    )
    before = codebooks.detach().clone(), other.detach().clone()
    chosen = settings(
        distill=Distill(hidden_states=1.0), arguments={"max_steps": 1, "learning_rate": 1e-4}
    )
    train(
        model,
        chosen,
        training_data("feature-extraction", teacher=encoder(num_hidden_layers=4)),
        done,
    )
    steps = [
        float((a.detach() - b).abs().max()) for a, b in zip((codebooks, other), before, strict=True)
    ]
    assert steps == pytest.approx([0.03, 1e-4], rel=0.05)


def test_the_pass_has_an_option_for_it() -> None:
    model = encoder()
    (done,) = coded(model, codebook_learning_rate=0.03)
    assert isinstance(done.objective, LearningRate)
    codebooks = model.get_parameter("embeddings.word_embeddings.hard.codebooks")
    before = codebooks.detach().clone()
    chosen = settings(
        distill=Distill(hidden_states=1.0), arguments={"max_steps": 1, "learning_rate": 1e-4}
    )
    train(
        model,
        chosen,
        training_data("feature-extraction", teacher=encoder(num_hidden_layers=4)),
        [done],
    )
    assert float((codebooks.detach() - before).abs().max()) == pytest.approx(0.03, rel=0.05)


def test_a_loss_that_is_no_number_names_the_step() -> None:
    model = encoder()
    done = [replace(done, objective=Broken()) for done in coded(model)]
    chosen = settings(distill=Distill(pooled=1.0))
    found = refused(model, chosen, training_data("feature-extraction", teacher=encoder()), done)
    assert found.code == "PLM303"
    assert "the loss is nan at step 3" in found.message


# --- precision, evaluation while training


def test_mixed_precision_leaves_the_model_as_it_was() -> None:
    model = encoder()
    teacher, done = copy.deepcopy(model), coded(model)
    log = train(
        model,
        settings(distill=Distill(hidden_states=1.0), arguments={"bf16": True}),
        training_data("feature-extraction", teacher=teacher),
        done,
    )
    assert losses(log)[-1] < losses(log)[0]
    with torch.no_grad():
        output = model(torch.arange(5, 12)[None], output_hidden_states=True)
    states = output.last_hidden_state
    assert len(output.hidden_states) == 3, "the model lost what transformers wraps around forward"
    assert states.dtype == torch.float32
    assert not torch.equal(states, states.bfloat16().float())


@pytest.mark.parametrize("labeled", [True, False])
def test_evaluation_while_training(labeled: bool) -> None:
    model = classifier()
    rows = sentences()
    if labeled:
        rows = rows.add_column("labels", [row % 2 for row in range(8)])
    given = training_data("text-classification", rows, eval=rows, teacher=classifier())
    chosen = settings(
        distill=Distill(logits=1.0), arguments={"eval_strategy": "steps", "eval_steps": 6}
    )
    found = [
        entry["eval_loss"] for entry in train(model, chosen, given, []) if "eval_loss" in entry
    ]
    assert len(found) == 2, "the rows of `eval:` were not evaluated"


def test_arguments_that_the_trainer_refuses() -> None:
    chosen = settings(
        distill=Distill(pooled=1.0), arguments={"eval_strategy": "steps", "eval_steps": 0}
    )
    found = refused(encoder(), chosen, training_data("feature-extraction", teacher=encoder()), [])
    assert (found.code, found.location) == ("PLM303", "train.arguments")


@pytest.mark.parametrize(
    "task", ["sentence-similarity", "feature-extraction", "text-classification"]
)
def test_nothing_to_learn_from(task: str) -> None:
    model = classifier() if task == "text-classification" else encoder()
    found = refused(model, settings(), training_data(task), [])
    assert found.code == "PLM303"
    assert "nothing to learn from" in found.message


# --- tasks of their own


def rows_of(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(file), **options)


def test_classification_learns_its_labels(tmp_path: Path) -> None:
    rows = [{"text": f"w{9 + i} w{i % 2} w{40 + i}", "label": i % 2} for i in range(16)]
    data = encode(rows_of(tmp_path, rows), "text-classification", words(), 32, classifier().config)
    model = classifier()
    log = train(
        model,
        settings(arguments={"max_steps": 40}),
        training_data("text-classification", data),
        coded(model),
    )
    assert losses(log)[0] > 0.5
    assert losses(log)[-1] < 0.2
    with torch.no_grad():
        batch = collator("text-classification", words())([data[row] for row in range(16)])
        predicted = model(**batch).logits.argmax(-1)
    assert torch.equal(predicted, batch["labels"])


def test_a_token_of_every_batch_is_masked() -> None:
    """The loss of a batch without any would be a mean over nothing, and end the training."""
    collate = collator("fill-mask", words())
    for row in sentences(100):
        assert (collate([row])["labels"] != -100).any()


@pytest.mark.parametrize(("task", "name"), [("fill-mask", "bert"), ("text-generation", "gpt2")])
def test_language_models_learn_from_text_alone(tmp_path: Path, task: str, name: str) -> None:
    rows = [{"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9"}] * 8
    data = encode(rows_of(tmp_path, rows), task, words(), 32)
    model = tiny(name)
    log = losses(
        train(model, settings(arguments={"max_steps": 30}), training_data(task, data), coded(model))
    )
    assert sum(log[-5:]) < 0.5 * sum(log[:5])


def test_similarity_learns_from_labeled_pairs(tmp_path: Path) -> None:
    rows = [
        {
            "sentence1": f"w{i} w{i + 1}",
            "sentence2": f"w{i + 30 * (i % 2)} w{i + 1}",
            "score": score,
        }
        for i, score in enumerate([5.0, 0.0] * 8)
    ]
    data = encode(rows_of(tmp_path, rows), "sentence-similarity", words(), 32)
    assert set(data["labels"]) == {0.0, 1.0}
    model = encoder()
    given = training_data("sentence-similarity", data)
    log = losses(train(model, settings(arguments={"max_steps": 30}), given, coded(model)))
    assert sum(log[-5:]) < 0.6 * sum(log[:5])


def test_the_loss_of_pairs_is_of_the_right_pairs(tmp_path: Path) -> None:
    rows = [
        {"text_a": "w1 w2 w3", "text_b": "w1 w2 w3", "label": 4},
        {"text_a": "w4", "text_b": "w50 w51 w52 w53", "label": 0},
        {"text_a": "w9 w8", "text_b": "w9 w7", "label": 1},
    ]
    data = encode(rows_of(tmp_path, rows), "sentence-similarity", words(), 32)
    model, expected = encoder(), 0.0
    for row in rows:
        with torch.no_grad():
            one, two = (
                model(**words()(row[key], return_tensors="pt")).last_hidden_state[0].mean(0)
                for key in ("text_a", "text_b")
            )
        cosine = float(F.cosine_similarity(one, two, dim=0))
        expected += (cosine - int(row["label"]) / 4) ** 2 / 3  # type: ignore[call-overload]
    once = settings(arguments={"max_steps": 1})
    found = losses(train(model, once, training_data("sentence-similarity", data), []))
    assert found == pytest.approx([expected], rel=1e-4)


def test_unlabeled_pairs_are_separate_rows(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path, [{"text_a": "w1", "text_b": "w2 w3"}, {"text_a": "w4", "text_b": "w5"}]
    )
    data = encode(rows, "sentence-similarity", words(), 32)
    assert [len(ids) for ids in data["input_ids"]] == [3, 3, 4, 3]
    assert "labels" not in data.column_names


@pytest.mark.parametrize("label", [2, -1, 0.5, "x"])
def test_labels_outside_the_range_name_the_row(tmp_path: Path, label: object) -> None:
    values = [0, 1, label, 1]
    rows = [{"text": "w1 w2", "label": str(v) if isinstance(label, str) else v} for v in values]
    with pytest.raises(PlmccError, match="line 3") as caught:
        encode(rows_of(tmp_path, rows), "text-classification", words(), 32, classifier().config)
    (found,) = caught.value.diagnostics
    assert (found.code, found.allowed) == ("PLM302", "whole numbers 0 to 1")


def test_similarity_labels_are_numbers(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [{"text_a": "w1", "text_b": "w2", "label": "much"}])
    with pytest.raises(PlmccError, match="is not a number"):
        encode(rows, "sentence-similarity", words(), 32)


def test_missing_labels_name_the_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [{"text": "w1", "label": 1}, {"text": "w2", "label": None}])
    with pytest.raises(PlmccError, match="line 2 has no label"):
        encode(rows, "text-classification", words(), 32, classifier().config)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [{"text": "w1 " * 30}])
    data = encode(rows, "feature-extraction", words(), 12)
    assert len(data["input_ids"][0]) == 12


# --- synthetic data


def test_synthetic_rows_are_drawn_by_zipf_without_special_words() -> None:
    tokenizer = words()
    rows = synthetic_rows(Synthetic(sequences=400, length=8), VOCAB, tokenizer, 0)
    ids = torch.tensor(rows["input_ids"])
    assert ids.shape == (400, 10)
    assert set(ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(ids[:, -1].tolist()) == {tokenizer.sep_token_id}
    inner = ids[:, 1:-1].flatten()
    assert not set(inner.tolist()) & set(tokenizer.all_special_ids)
    counts = inner.bincount(minlength=VOCAB)
    assert int(counts.argmax()) == 5  # the first plain word
    assert float(counts[5] / counts[6]) == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_the_exponent_of_synthetic_rows(exponent: float) -> None:
    drawn = synthetic_rows(Synthetic(sequences=400, length=8, exponent=exponent), VOCAB, None, 0)
    counts = torch.tensor(drawn["input_ids"]).flatten().bincount(minlength=VOCAB)
    assert float(counts[0] / counts.sum()) == pytest.approx(
        1 / sum((k + 1) ** -exponent for k in range(VOCAB)), rel=0.3
    )


def test_synthetic_rows_depend_on_the_seed_alone() -> None:
    one, two, three = (
        synthetic_rows(Synthetic(sequences=5, length=8), VOCAB, None, seed)["input_ids"][:]
        for seed in (1, 1, 2)
    )
    assert one == two != three


@pytest.mark.parametrize("task", ["fill-mask", "text-generation"])
def test_synthetic_rows_teach(task: str) -> None:
    model = tiny("bert" if task == "fill-mask" else "gpt2")
    teacher, done = copy.deepcopy(model), coded(model)
    rows = synthetic_rows(Synthetic(sequences=40, length=8), VOCAB, words(), 0)
    chosen = settings(distill=Distill(logits=1.0, task=0.0))
    log = losses(train(model, chosen, training_data(task, rows, teacher=teacher), done))
    assert sum(log[-3:]) < 0.9 * sum(log[:3])


# --- reading

TABLE = [
    {"text": "w1, w2", "label": 0},
    {"text": 'w3 "w4"', "label": 1},
    {"text": "null", "label": 1},
]


def as_csv(separator: str) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if separator == "," else text

    lines = [f"{cell(str(row['text']))}{separator}{row['label']}" for row in TABLE]
    return "\n".join([f"text{separator}label", *lines, ""])


def files(folder: Path) -> Iterator[Path]:
    lines = "".join(json.dumps(row) + "\n" for row in TABLE)
    texts = {"csv": as_csv(","), "tsv": as_csv("\t"), "jsonl": lines}
    for kind, text in texts.items():
        (folder / f"rows.{kind}").write_text(text)
        yield folder / f"rows.{kind}"
        with gzip.open(folder / f"zipped.{kind}.gz", "wt") as opened:
            opened.write(text)
        yield folder / f"zipped.{kind}.gz"
    Dataset.from_list(TABLE).to_parquet(folder / "rows.parquet")
    yield folder / "rows.parquet"


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    for file in files(tmp_path):
        rows = load_rows(str(file))
        assert (rows.text, rows.label) == (("text",), "label"), file.name
        assert rows.texts() == [row["text"] for row in TABLE], file.name
        assert rows.labels() == [0, 1, 1], file.name


@pytest.mark.parametrize("name", ["lines.txt", "corpus.en", "lines.txt.gz"])
def test_lines_of_text(tmp_path: Path, name: str) -> None:
    text = "w1 w2\n\n  \nw3, w4\n"
    if name.endswith(".gz"):
        with gzip.open(tmp_path / name, "wt") as opened:
            opened.write(text)
    else:
        (tmp_path / name).write_text(text)
    rows = load_rows(str(tmp_path / name))
    assert (rows.texts(), rows.label) == (["w1 w2", "w3, w4"], None)


def test_globs_lists_and_limits(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    whole = load_rows(str(tmp_path / "*.txt"))
    assert whole.texts() == ["a1", "a2", "b1", "b2"]
    listed = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    assert load_rows(listed, limit=3).texts() == ["b1", "b2", "a1"]
    assert load_rows("a.txt", base=tmp_path).texts() == ["a1", "a2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "the file is empty"),
        ("empty.txt", "", "the file is empty"),
        ("blank.txt", "\n  \n\n", "every row is empty in text"),
        ("header.csv", "text,label\n", "no data|no rows"),
        ("rows.xlsx", "x", "of the type `.xlsx`"),
        ("rows.jsonl", "{not json\n", "rows.jsonl:1: .*no JSON"),
        ("rows.csv", "words,label\nw1,0\n", "the text column is unknown"),
        ("rows.parquet", "no parquet", "cannot be read"),
        ("rows.csv.gz", "not zipped", "cannot be read"),
    ],
)
def test_files_without_rows(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PlmccError, match=message) as caught:
        load_rows(str(tmp_path / name))
    (found,) = caught.value.diagnostics
    assert found.code == "PLM301"
    assert name in str(found.location)


@pytest.mark.parametrize(
    ("options", "nearest"), [({"text": "txet"}, "text"), ({"label": "lable"}, "label")]
)
def test_a_missing_column_comes_with_the_nearest(
    tmp_path: Path, options: dict[str, str], nearest: str
) -> None:
    with pytest.raises(PlmccError, match="there is no column") as caught:
        rows_of(tmp_path, TABLE, **options)
    (found,) = caught.value.diagnostics
    assert found.code == "PLM301"
    assert f"`{nearest}`" in found.hint


def test_a_missing_file_comes_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sentences.txt").write_text("w1\n")
    with pytest.raises(PlmccError, match="does not exist") as caught:
        load_rows(str(tmp_path / "sentence.txt"))
    assert "sentences.txt" in caught.value.diagnostics[0].hint
    with pytest.raises(PlmccError, match="this is a directory, not a file"):
        load_rows(str(tmp_path))


def test_files_of_different_kinds_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1\n")
    (tmp_path / "b.csv").write_text("text\nw1\n")
    with pytest.raises(PlmccError, match="different kinds"):
        load_rows([str(tmp_path / "a.txt"), str(tmp_path / "b.csv")])


def test_shared_data_can_be_read() -> None:
    found = sorted(SHARED.rglob("*.csv")) + sorted(SHARED.rglob("*.tsv")) if SHARED.is_dir() else []
    if not found:
        pytest.skip("there is no ../shared/data with csv or tsv files beside the project")
    readable = [file for file in found if "label" in file.read_text(errors="replace")[:200]]
    for file in readable[:3]:
        rows = load_rows(str(file), text=None, limit=5) if _has_text(file) else None
        assert rows is None or 0 < len(rows) <= 5


def _has_text(file: Path) -> bool:
    first = file.read_text(errors="replace").partition("\n")[0]
    return bool({"text", "sentence", "sentence1"} & set(first.replace("\t", ",").split(",")))
