"""Write the tables and values of README and docs from `benchmarks/results/*.json`.

A table is between `<!-- table: NAME -->` and `<!-- end -->`, a single value within a sentence
between `<!-- value: NAME -->` and `<!-- /value -->`. With `--check`, only compare.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: ([\w.]+) -->).*?(<!-- /value -->)", re.DOTALL)
Row = dict[str, Any]


def markdown(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def minilm_codes(rows: list[Row]) -> str:
    head = ("", "table", "smaller", "STS-B dev", "STS-B test", "model file", "latency 1 / 32")
    return markdown(head, [_minilm_row(row) for row in rows])


def _minilm_row(row: dict[str, Any]) -> tuple[str, ...]:
    size = f"{row['model_bytes'] / 1e6:.1f} MB" if row["model_bytes"] else ""
    ratio = row["latency_ratio"]
    latency = f"x{ratio['1']:.3f} / x{ratio['32']:.3f}" if ratio else ""
    return (
        row["system"],
        f"{row['table_bytes'] / 1e6:.2f} MB",
        f"{row['table_compression']:.1f}x",
        f"{row['stsb_dev']:.2f}",
        f"{row['stsb_test']:.2f}",
        size,
        latency,
    )


def codes_initialisation(rows: list[Row]) -> str:
    head = ("", "codes", "relative error", "mean distance", "seconds")
    return markdown(
        head,
        [
            (
                row["initialisation"],
                f"{row['codebooks']} of {row['codewords']}",
                f"{row['relative_error']:.3f}",
                f"{row['mean_distance']:.3f}",
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )


def embeddings(rows: list[Row]) -> str:
    """By size; the row to choose is the best on dev, and its test score is then read off."""
    head = ("", "settings", "table", "smaller", "model", "STS-B dev", "STS-B test")
    return markdown(
        head,
        [
            (
                row["method"],
                _settings(row),
                f"{row['table_bytes'] / 1e6:.2f} MB",
                f"{row['table_compression']:.1f}x",
                f"{row['model_bytes'] / 1e6:.1f} MB",
                f"{row['stsb_dev']:.2f}",
                f"{row['stsb_test']:.2f}",
            )
            for row in rows
        ],
    )


def _settings(row: Row) -> str:
    """The options of a recipe's passes under their present names, without the passes' own."""
    if row["kind"] != "recipe":
        return str(row["settings"])
    return re.sub(r"\b[A-Z]\w+ ", "", row["settings"]).replace("initialisation", "initialization")


_METHODS = {
    "binary_embedding": "binary codes",
    "pruned_codes": "pruned vocabulary, codes",
    "pruned_codes, int8 linears": "pruned vocabulary, codes, int8 linear layers",
}


def sizes(rows: list[Row]) -> str:
    """The README's summary of `embeddings`: at each size, the recipe that is best on dev."""
    head = ("", "table", "smaller", "model", "STS-B dev", "STS-B test")
    return markdown(
        head,
        [
            (
                str(_METHODS.get(row["method"], row["method"])),
                f"{row['table_bytes'] / 1e6:.2f} MB",
                f"{row['table_compression']:.1f}x",
                f"{row['model_bytes'] / 1e6:.1f} MB",
                f"{row['stsb_dev']:.2f}",
                f"{row['stsb_test']:.2f}",
            )
            for row in best_by_size(rows)
        ],
    )


def best_by_size(rows: list[Row]) -> list[Row]:
    """Return the original, the best recipe at each size, and the one with int8 linear layers."""
    recipes = [row for row in rows if row["kind"] == "recipe"]
    points = dict.fromkeys(row["point"] for row in recipes)
    best_at = [
        max((row for row in recipes if row["point"] == point), key=lambda row: row["stsb_dev"])
        for point in points
    ]
    others = {kind: [r for r in rows if r["kind"] == kind] for kind in ("original", "combined")}
    return [*others["original"], *best_at, *others["combined"]]


FLOAT32 = ("eager", "compiled", "exported")
RATIOS = (
    ("C to B", ("C", FLOAT32), ("B", FLOAT32)),
    ("C to B, int8", ("C", ("int8",)), ("B", ("int8",))),
    ("D to A", ("D", FLOAT32), ("A", FLOAT32)),
    ("E to A", ("E", FLOAT32), ("A", FLOAT32)),
    ("E to A, int8", ("E", ("int8",)), ("A", ("int8",))),
    ("A compiled to A eager", ("A", ("compiled",)), ("A", ("eager",))),
    ("D to A in CTranslate2", ("D", FLOAT32), ("A", ("ctranslate2 float32",))),
    ("E to A in CTranslate2", ("E", FLOAT32), ("A", ("ctranslate2 float32",))),
    ("D to A in CTranslate2, int8", ("D", ("int8",)), ("A", ("ctranslate2 int8",))),
    ("E to A in CTranslate2, int8", ("E", ("int8",)), ("A", ("ctranslate2 int8",))),
)


def translation(rows: list[Row]) -> str:
    settings = list(dict.fromkeys((row["batch"], row["beam"]) for row in rows))
    systems = dict.fromkeys((row["system"], row["mode"]) for row in rows)
    found = {(r["system"], r["mode"], r["batch"], r["beam"]): r for r in rows}
    head = ("", "BLEU", *(f"{batch} / {beam}" for batch, beam in settings))
    lines = []
    for system, mode in systems:
        cells = [found[system, mode, *setting] for setting in settings]
        bleu = max(cells, key=lambda cell: cell["beam"])["bleu_test"]
        rates = (f"{cell['tokens_per_second']:.0f}" for cell in cells)
        lines.append((f"{system}, {mode}", f"{bleu:.2f}" if bleu else "", *rates))
    compared = ("times as fast", *head[2:])
    ratios = [
        (name, *(f"{best(found, a, at) / best(found, b, at):.2f}" for at in settings))
        for name, a, b in RATIOS
        if all(any((system, mode) in systems for mode in modes) for system, modes in (a, b))
    ]
    return markdown(head, lines) + "\n" + markdown(compared, ratios)


def best(found: dict[Any, dict[str, Any]], which: tuple[str, tuple[str, ...]], at: Any) -> float:
    """Return the most tokens per second of a system in any of some modes."""
    system, modes = which
    rows = (found.get((system, mode, *at)) for mode in modes)
    return max(float(row["tokens_per_second"]) for row in rows if row is not None)


def low_rank(rows: list[Row]) -> str:
    """Of each size, the weightings; the original first."""
    head = ("kept", "weighting", "calibrated on", "model", "STS-B dev", "STS-B test")
    first = rows[0]
    scores = (f"{first['original_dev']:.2f}", f"{first['original_test']:.2f}")
    lines = [("", "original", "", "", *scores)]
    lines += [
        (
            f"{row['parameters']:.0%}",
            row["weighting"],
            row["calibration"],
            f"{row['model_bytes'] / 1e6:.1f} MB",
            f"{row['stsb_dev']:.2f}",
            f"{row['stsb_test']:.2f}",
        )
        for row in rows
    ]
    return markdown(head, lines)


def llm(rows: list[Row]) -> str:
    """By share of the layers' parameters that is removed: perplexity relative to the original, the
    mean over calibration seeds."""
    shares = sorted({row["removed"] for row in rows})
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["system"], row["steps"]].append(row)
    lines = []
    for (system, steps), found in groups.items():
        name = system.replace("_", " ") + (f", {steps} steps" if steps else "")
        cells = []
        for share in shares:
            values = [row["perplexity_ratio"] for row in found if row["removed"] == share]
            cells.append(f"{sum(values) / len(values):.2f}" if values else "")
        seeds = len({row["seed"] for row in found})
        lines.append((name, *cells, str(seeds), "yes" if all(r["stock"] for r in found) else "no"))
    heads = [f"{share:.0%} removed" for share in shares]
    return markdown(("", *heads, "seeds", "ordinary checkpoint"), lines)


def joint_attention(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    keys = ("rows", "queries", "source", "target")
    shapes: dict[tuple[int, ...], dict[str, float]] = {}
    for row in rows:
        times = shapes.setdefault(tuple(row[key] for key in keys), {})
        times[row["kernel"]] = row["microseconds"]
    head = ("rows x queries, source + target", *names)
    return markdown(
        head,
        [
            (f"{r} x {q}, {s} + {t}", *(f"{times[name]:.0f}" for name in names))
            for (r, q, s, t), times in shapes.items()
        ],
    )


def pruning(rows: list[Row]) -> str:
    keys = ("method", "granularity", "target", "distilled")
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("part") != "step":
            runs.setdefault(tuple(row[key] for key in keys), []).append(row)
    order = sorted(runs, key=lambda run: (str(run[1]), -_number(run[2]), str(run[0]), run[3]))
    head = ("", "asked", "density", "distilled", "accuracy", "seeds", "throughput")
    lines = [_pruning_row(run, runs[run]) for run in order]
    steps = [row for row in rows if row.get("part") == "step"]
    costs = markdown(
        ("training step under masks", "mode", "time", "memory"),
        [
            (
                f"{row['method']}, {row['granularity']}",
                row["mode"],
                f"x{row['time_ratio']:.2f}",
                f"x{row['memory_ratio']:.2f}",
            )
            for row in steps
        ],
    )
    return markdown(head, lines) + ("\n" + costs if steps else "")


WORK = {
    "binarise": "256 bits, 10 epochs",
    "query": "ten nearest words of 256 bits",
    "codes": "16 codebooks of 32, residual",
    "read": "reading a text file",
}


def vectors_speed(rows: list[Row]) -> str:
    head = ("large tables of 300 dimensions", "rows", "threads", "time", "peak memory")
    return markdown(
        head,
        [
            (
                WORK[row["measure"]],
                f"{row['rows']:,}",
                str(row["threads"]),
                _time(row["seconds"]),
                f"{row['peak_gb']:.1f} GB",
            )
            for row in rows
        ],
    )


def tied_head(rows: list[Row]) -> str:
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["head"], row["tokens"]): row for row in rows}
    head = ("head, time relative to the dense one", *(f"{n} tokens" for n in tokens), "weights")
    return markdown(
        head,
        [
            (
                name,
                *(f"x{found[name, n]['ratio']:.2f}" for n in tokens),
                f"{100 * found[name, tokens[0]]['weight_share']:.1f} %",
            )
            for name in dict.fromkeys(row["head"] for row in rows)
        ],
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def vectors(every: list[Row]) -> str:
    rows = [row for row in every if "measure" not in row]
    speed = [row for row in every if "measure" in row]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    datasets.sort(key="preservation".__ne__)
    runs: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["method"], row["bits"])
        runs.setdefault(key, {})[row["dataset"]] = row["spearman"]
    short = [name.removeprefix("EN-").split("-")[0] for name in datasets]
    lines = [
        (method, str(bits or ""), *(f"{run[d]:.1f}" if d in run else "" for d in datasets))
        for (method, bits), run in runs.items()
    ]
    large = "\n" + vectors_speed(speed) if speed else ""
    return markdown(("", "bits", *short), lines) + large


def _number(target: Any) -> float:
    found = re.match(r"[\d.]+", str(target))
    return float(found.group()) if found else 0.0


def _pruning_row(run: tuple[Any, ...], rows: list[Row]) -> tuple[str, ...]:
    method, granularity, target, distilled = run
    percent = f"{100 * target:g} %" if isinstance(target, float) else target or ""
    kept = [row["density"] for row in rows if row["density"] is not None]
    ratios = [row["throughput_ratio"] for row in rows if row["throughput_ratio"] is not None]
    return (
        f"{method}, {granularity}" if granularity else method,
        percent,
        _spread([100 * value for value in kept]) + (" %" if kept else ""),
        "yes" if distilled else "",
        _spread([row["accuracy"] for row in rows]),
        str(len(rows)),
        _spread(ratios, "x"),
    )


def _spread(values: list[float], unit: str = "") -> str:
    """Return the mean and, of several values, the standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}{unit}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def export(rows: list[Row]) -> str:
    """Time relative to onnxruntime on the original, by batch and length."""
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    head = ("", "file", *(f"{batch} x {length}" for batch, length in shapes))
    found = {(row["system"], row["batch"], row["length"]): row for row in rows}
    return markdown(
        head,
        [
            (
                name,
                f"{found[name, *shapes[0]]['bytes'] / 1e6:.1f} MB",
                *(
                    f"x{found[name, *at]['ratio']:.2f} ± {found[name, *at]['spread']:.2f}"
                    for at in shapes
                ),
            )
            for name in dict.fromkeys(row["system"] for row in rows)
        ],
    )


def multilingual(rows: list[Row]) -> str:
    """Sizes and scores by language, from large to small; what is quoted has no scores."""
    head = ("", "on disk", "en", "de", "es", "fr", "mean drop", "steps")
    found = []
    for row in sorted(rows, key=lambda one: -one["disk_bytes"]):
        scores = row.get("stsb_test", {})
        cells = [f"{scores[name]:.2f}" if name in scores else "" for name in head[2:6]]
        drop = f"{row['mean_drop']:.2f}" if "mean_drop" in row else ""
        size = f"{row['disk_bytes'] / 1e6:.1f} MB"
        found.append((row["system"], size, *cells, drop, str(row.get("train_steps", ""))))
    return markdown(head, found)


def multilingual_short(rows: list[Row]) -> str:
    """The README's part of it: what was measured, without the ablations."""
    left = ("not trained", "FAISS", "6 layers")
    measured = [row for row in rows if "stsb_test" in row]
    return multilingual([r for r in measured if not any(w in r["system"] for w in left)])


_RATIOS = ("ratio_1x32", "ratio_32x64")


def classifier(rows: list[Row]) -> str:
    """Means over the seeds; of accuracies also how far below the float32 export of their seed."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    whole = {row["seed"]: row["accuracy"] for row in rows if row["system"] == systems[0]}
    found = []
    for system in systems:
        mine = [row for row in rows if row["system"] == system]
        mean = {
            k: statistics.fmean(row[k] for row in mine)
            for k in ("file_bytes", "accuracy", *_RATIOS)
        }
        drops = ", ".join(f"{whole[row['seed']] - row['accuracy']:.2f}" for row in mine)
        speed = [f"{mean[name]:.2f} x" for name in _RATIOS]
        size = f"{mean['file_bytes'] / 1e6:.1f} MB"
        found.append((system, size, f"{mean['accuracy']:.2f}", drops, *speed))
    head = ("", "file", "accuracy", "drop of each seed", "1 x 32 tokens", "32 x 64 tokens")
    return markdown(head, found)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "classifier": classifier,
    "codes_initialisation": codes_initialisation,
    "embeddings": embeddings,
    "export": export,
    "joint_attention": joint_attention,
    "llm": llm,
    "low_rank": low_rank,
    "minilm_codes": minilm_codes,
    "multilingual": multilingual,
    "pruning": pruning,
    "tied_head": tied_head,
    "translation": translation,
    "vectors": vectors,
}
SUMMARIES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "sizes": ("embeddings", sizes),
    "multilingual_short": ("multilingual", multilingual_short),
}
"""Short tables of the README, with the results that they are taken from."""


# --- values in sentences


def _one(name: str, **wanted: Any) -> Row:
    """Return the only row of a result that has these values."""
    [row] = [
        row
        for row in results(name)["rows"]
        if all(row.get(key) == value for key, value in wanted.items())
    ]
    found: Row = row
    return found


def _megabytes(name: str, key: str) -> str:
    return f"{_one(name, system='original')[key] / 1e6:.1f} MB"


def _bleu(system: str) -> float:
    return float(_one("translation", system=system, mode="exported", batch=1, beam=4)["bleu_test"])


def _translation_speedup() -> str:
    """The range, over batches and beams, of exported E relative to exported A."""
    rows = [row for row in results("translation")["rows"] if row["mode"] == "exported"]
    rate = {(r["system"], r["batch"], r["beam"]): r["tokens_per_second"] for r in rows}
    settings = {key[1:] for key in rate}
    ratios = [rate["E", *at] / rate["A", *at] for at in settings]
    return f"{min(ratios):.1f} to {max(ratios):.1f} times"


def _autoencoder_time() -> str:
    """The range of the time of the paper's autoencoder relative to residual quantization."""
    rows = results("codes_initialisation")["rows"]
    seconds = {(r["initialisation"], r["codebooks"]): r["seconds"] for r in rows}
    ratios = [
        seconds["paper, 200 epochs", books] / seconds["residual, beam 8, 3 rounds", books]
        for books in (32, 64)
    ]
    return f"{min(ratios):.0f} to {max(ratios):.0f} times"


PRUNED = {"method": "MvP, quickly, refilled", "granularity": "hybrid"}
VALUES: dict[str, Callable[[], str]] = {
    "codes.autoencoder_time": _autoencoder_time,
    "minilm.model": lambda: _megabytes("minilm_codes", "model_bytes"),
    "minilm.table": lambda: _megabytes("minilm_codes", "table_bytes"),
    "pruning.accuracy": lambda: f"{_one('pruning', **PRUNED)['accuracy']:.1f} %",
    "pruning.dense": lambda: f"{_one('pruning', method='dense')['accuracy']:.1f} %",
    "pruning.speedup": lambda: f"{_one('pruning', **PRUNED)['throughput_ratio']:.1f} times",
    "pruning.torch_pruning": lambda: f"{_one('pruning', method='Torch-Pruning')['accuracy']:.1f} %",
    "translation.bleu_loss": lambda: f"{_bleu('A') - _bleu('E'):.1f}",
    "translation.speedup": _translation_speedup,
}


# --- files


def results(name: str) -> dict[str, Any]:
    """Return what `benchmarks/NAME.py` wrote."""
    text = (ROOT / "benchmarks/results" / f"{name}.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def command(result: dict[str, Any]) -> str:
    """Return the command behind a result; `data` is wherever the data sets are."""
    return str(result["command"]).replace("../shared/data", "data")


def filled(text: str) -> str:
    """Return a page with its tables and values written anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(2)
        if name in SUMMARIES:
            source, render = SUMMARIES[name]
            return match.group(1) + render(results(source)["rows"]) + match.group(3)
        result = results(name)
        threads, torch = result["hardware"]["threads"], result["versions"]["torch"]
        seeds = result.get("seeds") or sorted({r["seed"] for r in result["rows"] if "seed" in r})
        setting = f"threads: {threads}, seeds: {seeds}, torch {torch}"
        note = f"; {result['note']}" if "note" in result else ""
        source = f"\n`{command(result)}`; {setting}{note}.\n"
        return match.group(1) + TABLES[name](result["rows"]) + source + match.group(3)

    def value(match: re.Match[str]) -> str:
        return match.group(1) + VALUES[match.group(2)]() + match.group(3)

    return VALUE.sub(value, TABLE.sub(table, text))


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    different = []
    for page in pages():
        text = page.read_text("utf-8")
        new = filled(text)
        if new != text:
            different.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new, "utf-8")
    if different and "--check" in sys.argv:
        sys.exit(f"not what the results say: {', '.join(different)}: run benchmarks/tables.py")


if __name__ == "__main__":
    main()
