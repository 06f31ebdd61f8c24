"""Translation on Multi30k de-en: compressed decoder attention against standard decoders.

    python benchmarks/translation.py --data ../shared/data/multi30k --work out/translation

Systems, each trained by a recipe of `recipes/` with the same data, seed and number of updates:

    A  translation-6-6                         standard layers
    B  translation-12-2                        standard layers
    C  compressed_attention-12-2               compressed attention from scratch
    D  compressed_attention-12-2-distilled     the same, on A's translations
    E  compressed_attention-fold               A, converted and fine-tuned

Each runs eager (`model.generate`), compiled (`plmcc.compile`), int8 (the same with int8 linear
layers, if torchao is installed) and exported (`plmcc export`), and A also in CTranslate2 if that is
installed. All systems of one setting take turns in one process on the first test sentences; a row's
tokens per second are the median over rounds. BLEU is that of beam 4 or greedy search on the whole
test set; choices were made on val. Finished artifacts and exports in --work are used again; a
system that cannot be trained for want of time is left out by --systems.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.artifact.size import file_bytes
from plmcc.evaluation.latency import measure_generation
from plmcc.export.exporter import export_model, quantize
from plmcc.models.source import load_source
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
RECIPES = {
    "A": "translation-6-6",
    "B": "translation-12-2",
    "C": "compressed_attention-12-2",
    "D": "compressed_attention-12-2-distilled",
    "E": "compressed_attention-fold",
}
SETTINGS = [(batch, beams) for batch in (1, 16, 64) for beams in (1, 4)]
SENTENCES = {1: 16, 16: 64, 64: 128}  # a round of each batch size takes about as long
LONGEST = 100
SAME = ("exported", "compiled", "eager")


def lines(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return stream.read().splitlines()


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def train(system: str, data: Path, work: Path, settings: list[str], teacher: Path) -> Path:
    """Apply a system's recipe unless its artifact is there; a relative data file is in `data`."""
    folder = teacher if system == "A" else work / system
    if folder.exists():
        return folder
    log(f"training {system}")
    new = system != "E"  # E begins with A, whose config is what it is
    sets = [s for s in settings if new or not s.startswith("model.")]
    if system in "BCD" and teacher.exists():
        sets += [f"model.tokenizer={teacher}"]
    cache = work / "teacher-translations"
    if system == "D":
        sets += [f"train.distill.teacher={teacher}", f"train.distill.sequence.cache={cache}"]
    if system == "E":
        sets += [f"stages.1.train.distill.sequence.cache={cache}"]
    recipe = plmcc.load_recipe(ROOT / "recipes" / f"{RECIPES[system]}.yaml", sets, load_torch=True)
    base: Any = teacher if system == "E" else None
    plmcc.apply(recipe, base, folder, base=data, log=log)
    return folder


class System:
    """A trained model in its forms."""

    def __init__(self, name: str, folder: Path, work: Path) -> None:
        self.name, self.folder, self.work = name, folder, work
        self.model, self.tokenizer = self._loaded()

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        source = load_source(self.folder, "translation")
        model: Any = source.model.eval().requires_grad_(False)
        return model.float(), source.need_tokenizer("translation")

    def form(self, mode: str) -> Callable[..., Tensor]:
        if mode == "exported":
            folder = self.work / f"{self.name}-aoti"
            if not folder.exists():
                export_model(self.model, self.tokenizer, folder)
            return plmcc.Exported(folder).generate

        model: Any = self._loaded()[0]
        if mode == "int8":
            quantize(model)
        if mode != "eager":
            plmcc.compile(model)

        def generate(input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
            inputs = (input_ids.to(model.device), attention_mask.to(model.device))
            found: Tensor = model.generate(inputs[0], attention_mask=inputs[1], **options)
            return found.cpu()

        return generate


def bleu(
    generate: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
    sources: list[list[int]],
    references: list[str],
    beams: int,
) -> float:
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    texts = [""] * len(sources)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = tokenizer.pad({"input_ids": [sources[i] for i in rows]}, return_tensors="pt")
        found = generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=beams,
            max_new_tokens=LONGEST,
        )
        decoded = tokenizer.batch_decode(found, skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = text
    return round(sacrebleu.corpus_bleu(texts, [references]).score, 2)


class CTranslate2:
    """A in CTranslate2, with the arguments of `generate`."""

    def __init__(self, system: System, work: Path, kind: str, threads: int) -> None:
        library = importlib.import_module("ctranslate2")
        folder = work / f"ctranslate2-{system.name}"
        if not folder.exists():
            _convert(library, system, folder)
        settings = {"compute_type": kind, "inter_threads": 1, "intra_threads": threads}
        self.translator = library.Translator(str(folder), device="cpu", **settings)
        self.tokenizer, self.config = system.tokenizer, system.model.generation_config

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, num_beams: int, max_new_tokens: int
    ) -> Tensor:
        tokens = [
            self.tokenizer.convert_ids_to_tokens(row[mask.bool()].tolist())
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        found = self.translator.translate_batch(
            tokens, beam_size=num_beams, max_decoding_length=max_new_tokens
        )
        ends: Any = self.config.eos_token_id
        convert: Any = self.tokenizer.convert_tokens_to_ids
        rows = [[0, *convert(result.hypotheses[0]), ends] for result in found]
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _convert(library: Any, system: System, folder: Path) -> None:
    """CTranslate2's own converter reads mBART only with mBART's tokenizer: the weights go into its
    specification by name."""
    common = importlib.import_module("ctranslate2.specs.transformer_spec")
    specs = importlib.import_module("ctranslate2.specs")
    model, config = system.model, system.model.config
    spec: Any = common.TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.encoder_attention_heads,
        pre_norm=True,
        activation=specs.common_spec.Activation.RELU,
        layernorm_embedding=True,
    )
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for side, part in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        _fill_stack(part, state, f"model.{side}", model, side == "decoder")
    spec.decoder.projection.weight = state["lm_head.weight"]
    spec.decoder.projection.bias = state["final_logits_bias"].ravel()
    tokenizer = system.tokenizer
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    spec.config.bos_token = tokenizer.convert_ids_to_tokens(config.decoder_start_token_id)
    spec.config.eos_token = tokenizer.eos_token
    spec.config.unk_token = tokenizer.unk_token
    spec.config.decoder_start_token = spec.config.bos_token
    spec.config.add_source_bos = False
    spec.config.add_source_eos = False
    spec.validate()
    spec.optimize(quantization=None)
    folder.mkdir(parents=True)
    spec.save(str(folder))


def _fill_stack(part: Any, state: Any, at: str, model: Any, decoder: bool) -> None:
    scale = model.config.d_model**0.5 if model.config.scale_embedding else 1.0
    table = part.embeddings[0] if isinstance(part.embeddings, list) else part.embeddings
    table.weight = state["model.shared.weight"]
    part.scale_embeddings = scale
    part.position_encodings.encodings = state[f"{at}.embed_positions.weight"][2:]
    for name, target in (
        ("layernorm_embedding", part.layernorm_embedding),
        ("layer_norm", part.layer_norm),
    ):
        _norm(target, state, f"{at}.{name}")
    for index, layer in enumerate(part.layer):
        own = f"{at}.layers.{index}"
        _norm(layer.self_attention.layer_norm, state, f"{own}.self_attn_layer_norm")
        _attention(layer.self_attention, state, f"{own}.self_attn", cross=False)
        if decoder:
            _norm(layer.attention.layer_norm, state, f"{own}.encoder_attn_layer_norm")
            _attention(layer.attention, state, f"{own}.encoder_attn", cross=True)
        _norm(layer.ffn.layer_norm, state, f"{own}.final_layer_norm")
        _linear(layer.ffn.linear_0, state, [f"{own}.fc1"])
        _linear(layer.ffn.linear_1, state, [f"{own}.fc2"])


def _attention(target: Any, state: Any, at: str, cross: bool) -> None:
    groups = [["q_proj"], ["k_proj", "v_proj"]] if cross else [["q_proj", "k_proj", "v_proj"]]
    for linear, names in zip(target.linear, [*groups, ["out_proj"]], strict=True):
        _linear(linear, state, [f"{at}.{name}" for name in names])


def _linear(target: Any, state: Any, names: list[str]) -> None:
    numpy: Any = importlib.import_module("numpy")
    target.weight = numpy.concatenate([state[f"{name}.weight"] for name in names])
    target.bias = numpy.concatenate([state[f"{name}.bias"] for name in names])


def _norm(target: Any, state: Any, at: str) -> None:
    target.gamma, target.beta = state[f"{at}.weight"], state[f"{at}.bias"]


def baselines(system: System, work: Path, threads: int) -> dict[str, Callable[..., Tensor]]:
    try:
        importlib.import_module("ctranslate2")
    except ImportError:
        log("ctranslate2 is not installed: no comparison with it")
        return {}
    return {
        f"A ctranslate2 {kind}": CTranslate2(system, work, kind, threads).generate
        for kind in ("float32", "int8")
    }


def quickest(forms: Mapping[str, Any], system: str) -> str:
    """The form that judges all that give the same tokens (a test of plmcc)."""
    return next(f"{system} {mode}" for mode in SAME if f"{system} {mode}" in forms)


def measured(
    systems: list[System], data: Path, work: Path, threads: int, rounds: int, modes: list[str]
) -> list[dict[str, Any]]:
    tokenizer = systems[0].tokenizer
    sources = [tokenizer(text)["input_ids"] for text in lines(data / "test_2016_flickr.de.gz")]
    references = lines(data / "test_2016_flickr.en.gz")
    forms = {
        f"{s.name} {mode}": s.form(mode)
        for mode, _, only in (text.partition(":") for text in modes)
        for s in systems
        if s.name in (only or s.name)
    }
    first = next((s for s in systems if s.name == "A"), None)
    device = systems[0].model.device.type
    forms |= baselines(first, work, threads) if first and device == "cpu" else {}
    scores: dict[tuple[str, int], float] = {}
    for name, generate in forms.items():
        system, _, mode = name.partition(" ")
        if mode in SAME and name != quickest(forms, system):
            continue
        for beams in (1, 4):
            scores[name, beams] = bleu(generate, tokenizer, sources, references, beams)
        log(name, {beams: scores[name, beams] for beams in (1, 4)})
    rows = []
    for batch, beams in SETTINGS:
        found = measure_generation(
            forms,
            sources[: SENTENCES[batch]],
            batch,
            beams,
            pad=0,
            eos=1,
            max_new_tokens=LONGEST,
            rounds=rounds,
        )
        for item in found:
            system, _, mode = item.name.partition(" ")
            judged = quickest(forms, system) if mode in SAME else item.name
            rows.append(
                {
                    "system": system,
                    "mode": mode,
                    "device": device,
                    "batch": batch,
                    "beam": beams,
                    "tokens_per_second": round(item.tokens_per_second, 1),
                    "spread": round(item.spread, 1),
                    "bleu_test": scores[judged, beams],
                }
            )
            log(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of Multi30k")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="a trained A; else its recipe is applied")
    parser.add_argument("--systems", default="ABCDE")
    parser.add_argument(
        "--modes",
        nargs="*",
        default=["eager", "compiled", "int8", "exported"],
        help="`int8:DE` for some systems only",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], dest="settings", help="for all recipes")
    parser.add_argument("--note", help="written into the results")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/translation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, data = arguments.work, arguments.data.resolve()
    work.mkdir(parents=True, exist_ok=True)
    teacher = (arguments.teacher or work / "A").resolve()
    folders = {
        name: train(name, data, work, arguments.settings, teacher)
        for name in dict.fromkeys(f"A{arguments.systems}")
    }
    systems = [System(name, folders[name], work) for name in arguments.systems]
    rows = measured(systems, data, work, arguments.threads, arguments.rounds, arguments.modes)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "command": f"python benchmarks/translation.py --data ../shared/data/multi30k --work out "
        f"--systems {arguments.systems} --threads {arguments.threads} "
        f"--rounds {arguments.rounds} --modes {' '.join(arguments.modes)}",
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": [0],
        "bytes": {s.name: file_bytes(s.folder) for s in systems},
        "rows": rows,
    }
    if arguments.note:
        result["note"] = arguments.note
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
