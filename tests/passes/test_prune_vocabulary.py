"""Vocabulary pruning: the same ids in new numbers, and the same outputs, for the text it kept."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as hf
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import plmcc
from plmcc.data.pooling import Pooling
from plmcc.diagnostics import PlmccError
from plmcc.evaluation.evaluator import Evaluator
from plmcc.models.source import Source, load_source
from plmcc.passes.prune_vocabulary import Language, PruneVocabulary
from plmcc.passes.prune_vocabulary.scripts import LANGUAGES, in_scripts
from plmcc.passes.prune_vocabulary.text import lines as lines_of
from plmcc.recipe.load import load_recipe, parse_recipe
from plmcc.rewrite import match

SENTENCES = Path(__file__).parents[2] / "examples/sentences.txt"
LINES = SENTENCES.read_text(encoding="utf-8").splitlines()
KEPT, DROPPED = LINES[:20], LINES[20:]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NAMES = list(SPECIAL.values())
SIZE = 400


def wordpiece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=NAMES))
    raw.decoder = decoders.WordPiece()
    return raw


def byte_level() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE + 200,
        special_tokens=NAMES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(LINES, trainer)
    raw.decoder = decoders.ByteLevel()
    return raw


def fallback() -> Tokenizer:
    """As in Llama and Gemma: BPE over text in which spaces are written, and bytes to fall back
    on."""
    hexadecimal = [f"<0x{byte:02X}>" for byte in range(256)]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=SIZE + 400, special_tokens=[*NAMES, *hexadecimal])
    raw.train_from_iterator(LINES, trainer)
    values = json.loads(raw.to_str())
    values["added_tokens"] = values["added_tokens"][: len(NAMES)]  # bytes are ordinary tokens
    raw = Tokenizer.from_str(json.dumps(values))
    raw.decoder = decoders.ByteFallback()
    return raw


def unigram() -> Tokenizer:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=NAMES, unk_token="<unk>")
    raw.train_from_iterator(LINES, trainer)
    raw.decoder = decoders.Metaspace()
    return raw


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "WordPiece": wordpiece,
    "byte-level BPE": byte_level,
    "BPE": fallback,
    "Unigram": unigram,
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer with one added token after its vocabulary."""
    raw = KINDS[kind]()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(n, raw.token_to_id(n)) for n in ("<s>", "</s>")]
    )
    found = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **SPECIAL)
    found.add_tokens([AddedToken("<extra>", normalized=False)])
    return found


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 80,
    "decoder_start_token_id": 0,
    "scale_embedding": True,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "WordPiece", SMALL),
    "albert": ("AlbertForMaskedLM", "Unigram", SMALL | {"embedding_size": 8}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "Unigram", SMALL),
    "roberta": ("RobertaForMaskedLM", "byte-level BPE", SMALL),
    "gpt2": (
        "GPT2LMHeadModel",
        "byte-level BPE",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 80},
    ),
    "gemma": ("GemmaForCausalLM", "BPE", SMALL | {"head_dim": 8, "num_key_value_heads": 1}),
    "llama": ("LlamaForCausalLM", "BPE", SMALL | {"tie_word_embeddings": False}),
    "t5": (
        "T5ForConditionalGeneration",
        "Unigram",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "marian": ("MarianMTModel", "Unigram", BART),
}


def source_of(name: str) -> Source:
    kind, tokens, options = MODELS[name]
    tokenizer = tokenizer_of(tokens)
    cls: Any = getattr(hf, kind)
    ids = {
        f"{n}_id": getattr(tokenizer, f"{n}_id") for n in ("pad_token", "bos_token", "eos_token")
    }
    # More rows than tokens, as many models have.
    config = cls.config_class(vocab_size=len(tokenizer) + 3, **ids, **options)
    torch.manual_seed(0)
    model: PreTrainedModel = cls(config)
    model.train(False)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
    return Source(model, "fill-mask", name, tokenizer)


def prune(source: Source, tmp_path: Path, lines: list[str] = KEPT, **options: Any) -> Source:
    file = tmp_path / "kept.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    done = PruneVocabulary(text=str(file), **options).prepare(source, None)
    return replace(source, tokenizer=done.tokenizer, retokenized=True)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_cut_into_the_tokens_of_before(kind: str, tmp_path: Path) -> None:
    source = source_of(next(name for name, value in MODELS.items() if value[1] == kind))
    before = source.need_tokenizer("the test")
    source = prune(source, tmp_path)
    after = source.need_tokenizer("the test")
    assert len(after) < len(before)
    for line in KEPT:
        assert after.tokenize(line) == before.tokenize(line)
        ids = after(line)["input_ids"]
        assert after.convert_ids_to_tokens(ids) == before.convert_ids_to_tokens(
            before(line)["input_ids"]
        )
        assert after.decode(ids) == before.decode(before(line)["input_ids"])
    for name in (*NAMES, "<extra>"):
        assert after.convert_ids_to_tokens(after.convert_tokens_to_ids(name)) == name
    order = [
        before.convert_tokens_to_ids(t)
        for t in after.convert_ids_to_tokens(list(range(len(after))))
    ]
    assert order == sorted(order)
    # Words that are not in the text are spelt with its characters, or in bytes.
    unknown = after.unk_token_id
    mixed = " ".join(word[::-1] for word in KEPT[0].lower().split() if word.isalpha())
    if after.convert_tokens_to_ids(after.tokenize(mixed)):
        assert unknown not in after(mixed)["input_ids"]
    if "BPE" in kind:
        text = str(after.decode(after("Ж ℵ")["input_ids"], skip_special_tokens=True))
        assert text.replace("\u2581", " ").strip() == "Ж ℵ"


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same(name: str, tmp_path: Path) -> None:
    source = source_of(name)
    original, old = source.original(), source.need_tokenizer("the test")
    source = prune(source, tmp_path)
    model: Any = source.model
    new = source.need_tokenizer("the test")
    assert model.config.vocab_size == len(new) == model.get_input_embeddings().weight.shape[0]
    again = dict(model.named_parameters())
    assert sum(p.numel() for p in again.values()) < sum(p.numel() for p in original.parameters())
    kept = old.convert_tokens_to_ids(new.convert_ids_to_tokens(list(range(len(new)))))
    for line in KEPT[:4]:
        given, expected = (t(line, return_tensors="pt") for t in (new, old))
        names = ["input_ids"]
        names += ["decoder_input_ids"] if model.config.is_encoder_decoder else []
        with torch.no_grad():
            found = model(**dict.fromkeys(names, given["input_ids"])).logits
            wanted = original(**dict.fromkeys(names, expected["input_ids"])).logits
        assert torch.equal(found, wanted[..., kept])


def test_configurations_name_the_new_ids(tmp_path: Path) -> None:
    source = source_of("marian")
    old = source.need_tokenizer("the test")
    model: Any = source.model
    lost = old.convert_tokens_to_ids(next(t for t in old.tokenize(" ".join(DROPPED)) if len(t) > 4))
    model.generation_config.bad_words_ids = [[old.pad_token_id], [lost, old.eos_token_id]]
    model.generation_config.suppress_tokens = [lost, old.unk_token_id]
    two = [old.pad_token_id, old.eos_token_id]
    model.generation_config.sequence_bias = [[two, 1.5], [[lost, old.eos_token_id], 2.0]]
    model.generation_config.force_words_ids = [[two, [lost]], [old.eos_token_id]]
    model.config.lang_to_id = {"<a>": old.eos_token_id, "<b>": lost}
    model.generation_config.forced_eos_token_id = old.eos_token_id
    source = prune(source, tmp_path)
    new = source.need_tokenizer("the test")
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == new.pad_token_id
        assert (
            config.eos_token_id == new.eos_token_id == model.generation_config.forced_eos_token_id
        )
        assert config.decoder_start_token_id == new.convert_ids_to_tokens([0]).index(
            old.convert_ids_to_tokens([0])[0]
        )
    assert model.model.shared.padding_idx == new.pad_token_id
    settings = model.generation_config
    assert settings.suppress_tokens == [new.unk_token_id]
    # A sequence with a dropped token cannot occur; a part of it must not be banned instead.
    assert settings.bad_words_ids == [[new.pad_token_id]]
    two = [new.pad_token_id, new.eos_token_id]
    assert settings.sequence_bias == [[two, 1.5]]
    assert settings.force_words_ids == [[two], [new.eos_token_id]]
    assert model.config.lang_to_id == {"<a>": new.eos_token_id}


def test_a_padding_token_numbered_last_is_kept_in_every_form(tmp_path: Path) -> None:
    source = source_of("gpt2")
    tokenizer = source.need_tokenizer("the test")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token="<pad>")
    source.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    source.model.config.pad_token_id = tokenizer.pad_token_id
    source = prune(source, tmp_path)
    new = source.need_tokenizer("the test")
    assert source.model.config.pad_token_id == new.pad_token_id
    new.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    assert stored["padding"] is None or stored["padding"]["pad_id"] == new.pad_token_id
    assert set(new.chat_template) == {"default", "tool"}


def test_the_most_frequent_are_kept(tmp_path: Path) -> None:
    whole = prune(source_of("bert"), tmp_path, keep=10**6)
    rare = prune(source_of("bert"), tmp_path, min_count=3)
    sizes = [len(one.need_tokenizer("the test")) for one in (rare, whole)]
    assert sizes[0] < sizes[1] < SIZE
    with pytest.raises(PlmccError, match="which are always kept, are more") as caught:
        prune(source_of("bert"), tmp_path, keep=3)
    least = int(caught.value.diagnostics[0].hint.split()[-1])
    smallest = prune(source_of("bert"), tmp_path, keep=least)
    assert len(smallest.need_tokenizer("the test")) == least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [7, 16])
def test_the_number_of_tokens_is_the_one_asked_for(kind: str, number: int, tmp_path: Path) -> None:
    """Also where BPE needs the tokens that a token is made from."""
    name = next(name for name, value in MODELS.items() if value[1] == kind)
    whole = len(prune(source_of(name), tmp_path).need_tokenizer("the test"))
    keep = whole - number
    source = prune(source_of(name), tmp_path, keep=keep)
    assert len(source.need_tokenizer("the test")) == keep
    assert source.model.config.vocab_size == keep
    source = prune(source_of(name), tmp_path, multiple_of=number)
    assert len(source.need_tokenizer("the test")) % number == 0
    assert 0 <= len(source.need_tokenizer("the test")) - whole < number


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_for_unseen_words_are_the_most_probable(kind: str, tmp_path: Path) -> None:
    name = next(name for name, value in MODELS.items() if value[1] == kind)
    few, whole = KEPT[:6], source_of(name)
    bare = prune(replace(whole, model=whole.original()), tmp_path, few)
    without = set(bare.need_tokenizer("the test").get_vocab())
    source = prune(replace(whole, model=whole.original()), tmp_path, few, unseen=9)
    after = source.need_tokenizer("the test")
    more = set(after.get_vocab()) - without
    assert without < set(after.get_vocab())
    assert len(more) == 9
    before = whole.need_tokenizer("the test")
    for line in few:
        assert after.tokenize(line) == before.tokenize(line)
    seen = {c for line in few for c in unicodedata.normalize("NFKC", line)}
    seen |= {character.lower() for character in seen}
    plain = {token.strip("\u2581\u0120#") for token in more}
    assert set("".join(plain)) <= seen
    if kind == "Unigram":  # nothing more probable was left out
        values = json.loads(before.backend_tokenizer.to_str())["model"]["vocab"]
        scores = dict(values)
        rest = set(scores) - set(after.get_vocab())
        written = [t for t in rest if set(t.strip("\u2581")) <= seen and t.strip("\u2581")]
        assert min(scores[t] for t in more) >= max(scores[t] for t in written)


@pytest.mark.parametrize("kind", ["one text", "pairs"])
def test_a_reranker_gives_the_same_scores(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("Unigram")
    options: Any = SMALL | {"num_labels": 1, "pad_token_id": 1}
    config = hf.XLMRobertaConfig(vocab_size=len(tokenizer), **options)
    torch.manual_seed(0)
    model: Any = hf.XLMRobertaForSequenceClassification(config).eval()
    source = Source(model, "text-classification", "reranker", tokenizer)
    original = source.original()
    texts = [KEPT[:8]] if kind == "one text" else [KEPT[:8], KEPT[8:16]]
    expected = Evaluator(original, tokenizer, Pooling()).logits(texts)
    pruned = prune(source, tmp_path)
    assert pruned.model.config.vocab_size < len(tokenizer)
    given = (pruned.model, pruned.need_tokenizer("the test"), Pooling())
    assert torch.equal(Evaluator(*given).logits(texts), expected)


def test_the_most_frequent_tokens_cover_a_part_of_the_text(tmp_path: Path) -> None:
    text = [" ".join(LINES[:3])] * 50 + LINES[3:20]
    (tmp_path / "a.txt").write_text("\n".join(text), encoding="utf-8")
    sizes = []
    for coverage in (0.8, 0.95, 0.99, 1.0):
        pruning = PruneVocabulary(text=str(tmp_path / "a.txt"), coverage=coverage)
        done = pruning.prepare(source_of("xlm-roberta"), None)
        assert coverage <= done.statistics["coverage"]
        sizes.append(done.statistics["tokens"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    every = prune(source_of("xlm-roberta"), tmp_path, text)
    assert sizes[-1] == len(every.need_tokenizer("the test"))


def test_languages_weigh_alike_or_by_their_text(tmp_path: Path) -> None:
    """A hundred times the text takes all the places, unless each language has its share."""
    (tmp_path / "much.txt").write_text("\n".join(LINES[:10] * 100), encoding="utf-8")
    (tmp_path / "little.txt").write_text("\n".join(LINES[10:20]), encoding="utf-8")
    text: dict[str, str | list[str]] = {
        "aa": [str(tmp_path / "much.txt")],
        "bb": str(tmp_path / "little.txt"),
    }
    found = {}
    for weighting in ("share", "alike"):
        options: Any = {"weighting": weighting, "coverage": 0.9}
        done = PruneVocabulary(text=text, **options).prepare(source_of("bert"), None)
        assert done.statistics["coverage_aa"] >= 0.8
        found[weighting] = done.statistics["coverage_bb"]
    assert found["share"] < found["alike"]
    (tmp_path / "r.yaml").write_text(f"plmcc: 1\npasses: [prune_vocabulary: {{text: {text}}}]\n")
    assert len(load_recipe(tmp_path / "r.yaml").passes[0].reads()) == 2


SCRIPTS = [
    "the house",
    "das Haus",
    "\u0434\u043e\u043c",
    "\u623f\u5b50",
    "\u03bf\u03af\u03ba\u03bf\u03c2",
    "1 2, 3!",
]


def scripted(kind: str) -> Source:
    """A model whose tokenizer has learned words of several scripts."""
    raw = KINDS[kind]()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=SIZE + 200,
        special_tokens=NAMES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    if kind == "Unigram":
        trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=NAMES, unk_token="<unk>")
    raw.train_from_iterator(SCRIPTS * 40, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)
    name = next(name for name, value in MODELS.items() if value[1] == kind)
    cls, _, options = MODELS[name]
    model = getattr(hf, cls)(getattr(hf, cls).config_class(vocab_size=len(tokenizer), **options))
    return Source(model, "fill-mask", name, tokenizer)


@pytest.mark.parametrize("kind", ["Unigram", "byte-level BPE"])
def test_without_text_the_scripts_of_languages_stay(kind: str) -> None:
    source = scripted(kind)
    before = source.need_tokenizer("the test")
    done = PruneVocabulary(languages=["de", "ru"]).prepare(source, None)
    after: Any = done.tokenizer
    assert len(after) < len(before)
    for text in (*SCRIPTS[:3], SCRIPTS[-1]):
        assert after.tokenize(text) == before.tokenize(text)
    had, left = (
        [before.decode([i]) for i in range(len(before))],
        [after.decode([i]) for i in range(len(after))],
    )
    for script in ("CJK", "GREEK"):
        names = [[unicodedata.name(c, "") for text in some for c in text] for some in (had, left)]
        known = [any(name.startswith(script) for name in each) for each in names]
        assert known == [True, False]


def test_text_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    """It would leave a vocabulary of special tokens that covers all of it."""
    with pytest.raises(PlmccError, match="reads 100% of the text as unknown tokens"):
        prune(source_of("bert"), tmp_path, ["\u623f\u5b50 \u03bf\u03af"] * 20)


def test_it_says_how_many_tokens_stay_and_what_they_cover(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LINES[:30]), encoding="utf-8")
    text: dict[str, str | list[str]] = {"aa": str(tmp_path / "a.txt")}
    done = PruneVocabulary(text=text, coverage=0.9).prepare(source_of("bert"), None)
    kept = int(done.statistics["tokens"])
    part = f"{done.statistics['coverage']:.2%}"
    told = f"{kept} tokens stay: {part} of those of the text (aa {part})"
    assert done.notes[0] == told


def test_languages_have_scripts() -> None:
    assert set(get_args(Language)) == set(LANGUAGES)


def test_marks_digits_and_punctuation_are_of_every_script() -> None:
    assert in_scripts("12,%", {"GREEK"})
    assert in_scripts("na\u0308ive", {"LATIN"})
    assert not in_scripts("\u03b1b", {"LATIN"})
    assert in_scripts("\u03b1b", {"LATIN", "GREEK"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "`text` is missing"),
        ({"text": "a", "languages": ["de"]}, "`languages` has no effect with `text`"),
        ({"languages": ["de"], "keep": 9}, "`keep` has no effect without `text`"),
        ({"languages": ["dde"]}, "Input should be 'af'"),
        ({"text": "a", "weighting": "alike"}, "`weighting` has no effect"),
        ({"text": "a", "keep": 100, "multiple_of": 64}, "`keep` is no multiple of 64"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PruneVocabulary(**options)


# --- with `apply`


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = source_of("xlm-roberta")
    source.model.save_pretrained(folder)
    source.need_tokenizer("the test").save_pretrained(folder)
    with gzip.open(folder / "kept.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\r\n".join(KEPT))
    return folder


RECIPE = """
plmcc: 1
passes:
  - prune_vocabulary: {text: kept.txt.gz}
"""


def test_alone_it_writes_a_checkpoint_that_needs_no_plmcc(checkpoint: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, load_torch=True)
    result = plmcc.apply(recipe, checkpoint, tmp_path / "out", base=checkpoint)
    lock = json.loads((tmp_path / "out/plmcc.lock.json").read_text())
    assert any("kept.txt.gz" in files for files in lock["data"].values())
    assert result.sites[0]["statistics"]["tokens"] < result.sites[0]["statistics"]["tokens_before"]
    script = (
        "import sys, torch; from transformers import AutoModel, AutoTokenizer\n"
        "folder, text = sys.argv[1:]\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModel.from_pretrained(folder).eval()\n"
        "assert 'plmcc' not in sys.modules\n"
        "print(float(model(**tokenizer(text, return_tensors='pt'))[0].norm()))\n"
    )
    folders = (checkpoint, tmp_path / "out")
    done = [
        subprocess.run(
            [sys.executable, "-c", script, f, KEPT[3]], capture_output=True, text=True, check=True
        )
        for f in folders
    ]
    assert float(done[0].stdout) == pytest.approx(float(done[1].stdout), abs=1e-5)


def test_fidelity_compares_with_the_original_and_all_its_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("WordPiece")
    options: dict[str, Any] = {"vocab_size": len(tokenizer), **SMALL}
    model = hf.BertModel(hf.BertConfig(**options)).train(False)
    source = Source(model, "feature-extraction", "bert", tokenizer)
    for name, lines in (("kept", KEPT), ("dropped", DROPPED)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    metrics = "\n".join(f"  - {{metric: fidelity, data: {n}.txt}}" for n in ("kept", "dropped"))
    text = f"plmcc: 1\npasses: [prune_vocabulary: {{text: kept.txt}}]\nevaluate:\n{metrics}\n"
    before = Evaluator(source.original(), tokenizer, Pooling()).embed(DROPPED)
    result = plmcc.apply(parse_recipe(text, load_torch=True), source, base=tmp_path)
    own = result.source.need_tokenizer("the test")
    after = Evaluator(result.model, own, Pooling()).embed(DROPPED)
    similarity = torch.nn.functional.cosine_similarity(before, after).mean()
    found = [metric["after"] for metric in result.metrics]
    assert found == pytest.approx([100, 100 * float(similarity)], abs=1e-3)
    assert found[1] < 99.9


def test_the_prompts_of_a_sentence_encoder_stay(tmp_path: Path) -> None:
    """They stand in no text, and before every one."""
    source = source_of("xlm-roberta")
    prompt = LINES[-1]
    before = source.need_tokenizer("the test").tokenize(prompt)
    for pooling in (Pooling(), Pooling(prompts=(prompt,))):
        done = prune(replace(source_of("xlm-roberta"), pooling=pooling), tmp_path, KEPT[:3])
        after = done.need_tokenizer("the test").tokenize(prompt)
        assert (after == before) == bool(pooling.prompts)


def test_other_passes_shrink_what_is_left(checkpoint: Path, tmp_path: Path) -> None:
    more = "  - compositional_codes: {codebooks: 4, codewords: 8}\n"
    recipe = parse_recipe(RECIPE + more, load_torch=True)
    plmcc.apply(recipe, checkpoint, tmp_path / "out", base=checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer)
    assert len(tokenizer) < len(AutoTokenizer.from_pretrained(checkpoint))
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer(KEPT[0], return_tensors="pt"))[0]).all()


def refused(source: Source | Path, text: str, base: Path | None = None) -> str:
    with pytest.raises(PlmccError) as caught:
        plmcc.apply(parse_recipe(text, load_torch=True), source, base=base)
    return str(caught.value)


def test_bad_input_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    whole = RECIPE.replace("kept.txt.gz", "empty.txt")
    assert "no token occurs often enough" in refused(checkpoint, whole, tmp_path)
    assert "missing.txt" in refused(checkpoint, RECIPE.replace("kept.txt.gz", "missing.txt"))
    bare = replace(source_of("bert"), tokenizer=None)
    assert "needs a tokenizer" in refused(bare, RECIPE, checkpoint)
    late = (
        "plmcc: 1\nstages:\n  - name: one\n    passes: [compositional_codes: {codebooks: 4, "
        "codewords: 8}]\n  - name: two\n    passes: [prune_vocabulary: {text: kept.txt.gz}]\n"
    )
    assert "move it to the first stage" in refused(checkpoint, late, checkpoint)
    few = source_of("bert")
    few.model.resize_token_embeddings(50)
    assert "rows" in refused(few, RECIPE, checkpoint)
    (tmp_path / "vectors.txt").write_text("a 1 2\nb 3 4\n")
    vectors = load_source(str(tmp_path / "vectors.txt"), "")
    assert "without an unknown token" in refused(vectors, RECIPE, checkpoint)
    with pytest.raises(PlmccError, match="to `plmcc apply`"):
        match(source_of("bert").model, [PruneVocabulary(text="x")])


def test_a_vocabulary_that_is_needed_whole_is_not_pruned(tmp_path: Path) -> None:
    source = source_of("bert")
    source = prune(source, tmp_path)
    with pytest.raises(PlmccError, match="nothing to prune"):
        source = prune(source, tmp_path)


def test_a_pruned_checkpoint_loads_as_a_source(checkpoint: Path, tmp_path: Path) -> None:
    plmcc.apply(
        parse_recipe(RECIPE, load_torch=True), checkpoint, tmp_path / "out", base=checkpoint
    )
    source = load_source(tmp_path / "out")
    assert len(source.need_tokenizer("the test")) == source.model.config.vocab_size


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    """A wrong path must not decide by its noise which tokens stay."""
    (tmp_path / "zeros.txt").write_bytes(b"a man\n\0\0\0\n")
    (tmp_path / "latin.txt").write_bytes("ein Kn\xf6del\n".encode("latin-1"))
    for name, said in (("zeros.txt", "zeros.txt:2: .*zero bytes"), ("latin.txt", "UTF-8")):
        with pytest.raises(PlmccError, match=said):
            list(lines_of(tmp_path / name))


def test_it_has_no_targets() -> None:
    with pytest.raises(ValueError, match="`targets` has no effect"):
        PruneVocabulary(text="a.txt", targets="encoder")
