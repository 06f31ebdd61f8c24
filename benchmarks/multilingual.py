"""multilingual-e5-small at several sizes, beside what else makes it small.

    python benchmarks/multilingual.py DATA MODEL

DATA is a folder with `stsb/`, `multi30k/` and `tatoeba_deen/`; MODEL a transformers directory of
multilingual-e5-small (its weights are those of a published 4-bit version). Text comes from the
training parts of STS-B (en, de, es, fr), Multi30k (en, de, fr) and Tatoeba (en, de); recipes were
chosen on STS-B dev.
Every row has Spearman's correlation on STS-B test, with the prompt `query: `; sizes are of weights,
tokenizer and configuration. The row of model2vec needs `pip install model2vec[distill]`.
A row that is in the result already, of the same commit, is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

import plmcc
from plmcc.artifact.environment import hardware, versions
from plmcc.artifact.size import component_bytes
from plmcc.evaluation.evaluator import Evaluator
from plmcc.evaluation.onnx_files import opened, speeds
from plmcc.experiments.baselines import baselines
from plmcc.experiments.candidates import side_bytes
from plmcc.experiments.compare import token_table
from plmcc.export.hub import FILES, write_hub
from plmcc.ir.program import Program
from plmcc.kit.tables import common_layout, table_of
from plmcc.models.source import Source, load_source
from plmcc.pipeline.datasets import source_rows
from plmcc.pipeline.run import run
from plmcc.recipe.load import Evaluate, parse_recipe
from plmcc.rewrite import splice
from plmcc.utils.files import write_json

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/multilingual.json"
LANGUAGES = ("en", "de", "es", "fr")
PROMPTS = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
STEPS = 300
LENGTH = 128
QUOTED = [
    {"system": "4-bit weights, as published (quoted)", "disk_bytes": 72_000_000, "quoted": True},
    {
        "system": "a trimmed and quantized version (quoted)",
        "disk_bytes": 51_000_000,
        "quoted": True,
    },
]

TRAIN = """
train:
  data: {{train: {train}, max_length: 64, limit: 12000}}
  dropout: false
  distill: {{teacher: original, hidden_states: 1.0, pooled: 1.0}}
  arguments:
    max_steps: {steps}
    per_device_train_batch_size: 32
    learning_rate: 2.0e-4
    warmup_steps: 20
    train_sampling_strategy: group_by_length
"""
CODES = "compositional_codes: {{width: {w}, codewords: 64, initialization: product, {rate}}}"
RATE = "codebook_learning_rate: 2.0e-3"


def pruned(text: list[str], coverage: float) -> str:
    return f"prune_vocabulary: {{text: {json.dumps(text)}, coverage: {coverage}}}"


class Bench:
    """The model, the data, and the rows."""

    def __init__(self, data: Path, model: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.model = folder / "model"
        self.model.mkdir()
        for file in model.iterdir():
            if file.suffix == ".safetensors":  # what is linked does not come along
                (self.model / file.name).symlink_to(file.resolve())
            else:
                shutil.copy(file, self.model / file.name)
        settings = self.model / "config_sentence_transformers.json"
        settings.write_text(json.dumps(PROMPTS))
        more = [data / f"multi30k/train.{language}.gz" for language in ("en", "de", "fr")]
        more += [data / f"tatoeba_deen/train.{language}.gz" for language in ("en", "de")]
        self.text = [*(str(self._sentences(language)) for language in LANGUAGES), *map(str, more)]

    def _sentences(self, language: str) -> Path:
        """The texts of the training part of STS-B, once each."""
        import gzip

        with gzip.open(self.data / f"stsb/{language}_train.tsv.gz", "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in list(file)[1:]]
        texts = dict.fromkeys(text for row in rows for text in row[1:3])
        made = self.folder / f"stsb.{language}.txt"
        made.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return made

    def source(self) -> Source:
        return load_source(self.model)

    def rows(self, source: Source, language: str) -> Any:
        name = "en_test.tsv" if language == "en" else f"{language}_test.tsv.gz"
        values: dict[str, Any] = {"text": ["text_a", "text_b"], "label": "label"}
        asked = Evaluate(metric="spearman", data=str(self.data / "stsb" / name), **values)
        return source_rows(source, asked, asked.data, None)

    def scores(self, source: Source) -> dict[str, float]:
        evaluator = Evaluator(
            source.model, source.need_tokenizer("this"), source.pooling, None, LENGTH
        )
        found = {n: evaluator.compute("spearman", self.rows(source, n)) for n in LANGUAGES}
        return {name: round(value, 3) for name, value in found.items()}

    def applied(self, text: str) -> Source:
        recipe = parse_recipe(f"plmcc: 1\ntask: sentence-similarity\n{text}", load_torch=True)
        with redirect_stdout(sys.stderr):
            return run(recipe, self.source(), lambda _: None, dry=True).source

    def measured(self, source: Source, table: int | None = None) -> dict[str, Any]:
        """Size and scores; `table`: bytes of a table that is held in float32 to be judged."""
        size = sum(component_bytes(source.model).values())
        if table is not None:
            held = source.model.get_input_embeddings()
            assert held is not None
            size += table - sum(t.nbytes for t in held.state_dict().values())
        return {"disk_bytes": size + side_bytes(source), "stsb_test": self.scores(source)}

    # --- the systems

    def original(self) -> dict[str, Any]:
        return self.measured(self.source())

    def recipe(self, coverage: float, width: int, linears: str, half: bool) -> dict[str, Any]:
        codes = CODES.format(w=width, rate=RATE)
        passes = [pruned(self.text, coverage), codes, f"quantized_linears: {linears}"]
        text = "dtype: float16\n" if half else ""
        text += "passes:\n" + "".join(f"  - {one}\n" for one in passes)
        text += TRAIN.format(train=json.dumps(self.text), steps=STEPS)
        named = [pruned([Path(name).name for name in self.text], coverage), *passes[1:]]
        return self.measured(self.applied(text)) | {"train_steps": STEPS, "recipe": named}

    def untrained(self, *passes: str, lower: str = "") -> dict[str, Any]:
        text = "passes:\n" + "".join(f"  - {one}\n" for one in passes) + lower
        return self.measured(self.applied(text))

    def layers(self) -> dict[str, Any]:
        """Half the layers, trained alike, with the vocabulary pruned."""
        text = "passes:\n  - " + pruned(self.text, 1.0) + "\n  - drop_layers: {keep: 6}\n"
        text += TRAIN.format(train=json.dumps(self.text), steps=STEPS).replace("2.0e-4", "1.0e-4")
        return self.measured(self.applied(text)) | {"train_steps": STEPS}

    def quantized(self, bits: int) -> dict[str, Any]:
        """Linear layers and table in 8 or 4 bits, by torchao."""
        source = self.applied(f"passes: [quantized_linears: {{scheme: int{bits}}}]\n")
        return self._with_table(source, f"int{bits} (torchao)", 10**9)

    def faiss(self, limit: int) -> dict[str, Any]:
        """The pruned table in product codes of FAISS, linear layers in 8 bits."""
        passes = pruned(self.text, 1.0), "quantized_linears: {scheme: int8}"
        source = self.applied("passes:\n" + "".join(f"  - {one}\n" for one in passes))
        return self._with_table(source, "PQ (FAISS)", limit)

    def _with_table(self, source: Source, name: str, limit: int) -> dict[str, Any]:
        site = token_table(source)
        found = baselines(site.num_embeddings, site.embedding_dim, limit)
        chosen = next(one for one in found if one.name == name)
        table = chosen.make(table_of(site), common_layout(site))
        splice(Program(source.model), site.paths, site.roles, table)
        return self.measured(source, chosen.size) | {"settings": chosen.settings}

    def model2vec(self) -> dict[str, Any]:
        """A static model, distilled from the same encoder."""
        distill = importlib.import_module("model2vec.distill").distill

        made = distill(str(self.model), device="cpu", pca_dims=256)
        folder = self.folder / "static"
        made.save_pretrained(folder)
        scores, source = {}, self.source()
        for language in LANGUAGES:
            rows = self.rows(source, language)
            plain = [[t.removeprefix("query: ") for t in rows.texts(c)] for c in (0, 1)]
            one, two = (torch.from_numpy(made.encode(texts)) for texts in plain)
            value = spearmanr(F.cosine_similarity(one, two).numpy(), rows.numbers())[0]
            scores[language] = round(100 * float(value), 3)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {"disk_bytes": size, "stsb_test": scores}

    def latency(self) -> dict[str, Any]:
        """How many times as fast as the float32 file of the original in onnxruntime the 30 MB model
        is, untrained (its shapes are the same): as int8 ONNX, and compiled by PyTorch."""
        passes = [pruned(self.text, 1.0), CODES.format(w=2, rate="").replace(", }", "}")]
        linears = "quantized_linears: {scheme: int8}"
        source = self.applied("passes:\n" + "".join(f"  - {x}\n" for x in [*passes, linears]))
        few = source.model.config.vocab_size
        compiled = plmcc.compile(copy.deepcopy(source.model))
        files = {}
        for name, made, kind in (("before", self.source(), "fp32"), ("after", source, "int8")):
            (self.folder / name).mkdir()
            write_hub(made, self.folder / name, (kind,))
            files[name] = self.folder / name / "onnx" / FILES[kind]
        shapes = ((1, 32), (32, 32))
        ratios = speeds(files["before"], files["after"], source.model, 10, few, shapes)
        own = {shape: self._compiled(compiled, files["before"], few, *shape) for shape in shapes}
        return {
            "onnx_int8": {f"{b}x{n}": round(value, 3) for (b, n), value in ratios.items()},
            "compiled": {f"{b}x{n}": round(value, 3) for (b, n), value in own.items()},
        }

    @staticmethod
    @torch.inference_mode()
    def _compiled(model: Any, file: Path, tokens: int, batch: int, length: int) -> float:
        """The shortest time of the file by that of a model in PyTorch."""
        ids = torch.randint(0, tokens, (batch, length), generator=torch.Generator().manual_seed(0))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        session = opened(file)
        fed = {port.name: given[port.name].numpy() for port in session.get_inputs()}
        runs: list[Callable[[], Any]] = [lambda: session.run(None, fed), lambda: model(**given)]
        best = []
        for run_ in runs:
            run_()
            times = []
            end = time.perf_counter() + 10
            while time.perf_counter() < end:
                start = time.perf_counter()
                run_()
                times.append(time.perf_counter() - start)
            best.append(min(times))
        return best[0] / best[1]

    def systems(self) -> dict[str, Callable[[], dict[str, Any]]]:
        int4 = "{{scheme: int4, group: {}}}".format
        return {
            "original": self.original,
            "plmcc, 30 MB": lambda: self.recipe(1.0, 2, "{scheme: int8}", False),
            "plmcc, 22 MB": lambda: self.recipe(1.0, 2, int4(32), False),
            "plmcc, 16 MB": lambda: self.recipe(0.998, 3, int4(128), True),
            "plmcc, 30 MB, not trained": lambda: self.untrained(
                pruned(self.text, 1.0),
                CODES.format(w=2, rate="").replace(", }", "}"),
                lower="lower: {quantize: int8}\n",
            ),
            "vocabulary pruned": lambda: self.untrained(pruned(self.text, 1.0)),
            "int8 (torchao)": lambda: self.quantized(8),
            "int4 (torchao)": lambda: self.quantized(4),
            "vocabulary pruned, FAISS PQ, int8": lambda: self.faiss(4_500_000),
            "vocabulary pruned, 6 layers": self.layers,
            "model2vec": self.model2vec,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--latency", action="store_true", help="measure times alone, anew")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = done.stdout.strip()
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    rows = kept["rows"] if kept.get("commit") == commit else []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(asked.data.resolve(), asked.model.resolve(), Path(name))
        if asked.latency:
            found = bench.latency()
            write_json(RESULT, kept | {"latency": {"commit": commit, "ratios": found}})
            return
        for system, work in bench.systems().items():
            if system in [row["system"] for row in rows]:
                continue
            start = time.perf_counter()
            row: dict[str, Any] = {"system": system, "seed": 0, "train_steps": 0} | work()
            row["seconds"] = round(time.perf_counter() - start)
            rows.append(row)
            first = rows[0]["stsb_test"]
            drops = [first[name] - row["stsb_test"][name] for name in LANGUAGES]
            row["mean_drop"] = round(sum(drops) / len(drops), 3)
            print({n: row[n] for n in ("system", "disk_bytes", "mean_drop")}, file=sys.stderr)
            write(commit, rows)
    write(commit, rows, QUOTED)


def write(commit: str, rows: list[dict[str, Any]], more: Sequence[dict[str, Any]] = ()) -> None:
    command = "python benchmarks/multilingual.py DATA MODEL"
    values = {"command": command, "commit": commit, "hardware": hardware(), "threads": 1}
    values |= {"versions": versions(), "prompt": "query: ", "rows": [*rows, *more]}
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    values |= {"latency": kept["latency"]} if "latency" in kept else {}
    write_json(RESULT, values)


if __name__ == "__main__":
    main()
