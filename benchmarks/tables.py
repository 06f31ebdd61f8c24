"""Write the README's tables from `benchmarks/results/*.json`; with `--check`, only compare.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def minilm_codes(rows: list[dict[str, Any]]) -> str:
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


def codes_initialisation(rows: list[dict[str, Any]]) -> str:
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


def embeddings(rows: list[dict[str, Any]]) -> str:
    """By size; the best on dev at each of them is what its test figure is read from."""
    head = ("", "settings", "table", "smaller", "model", "STS-B dev", "STS-B test")
    return markdown(
        head,
        [
            (
                row["method"],
                re.sub(r"\b[A-Z]\w+ ", "", row["settings"])
                if row["kind"] == "recipe"
                else row["settings"],
                f"{row['table_bytes'] / 1e6:.2f} MB",
                f"{row['table_compression']:.1f}x",
                f"{row['model_bytes'] / 1e6:.1f} MB",
                f"{row['stsb_dev']:.2f}",
                f"{row['stsb_test']:.2f}",
            )
            for row in rows
        ],
    )


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


def translation(rows: list[dict[str, Any]]) -> str:
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
    return max(row["tokens_per_second"] for row in rows if row is not None)


def joint_attention(rows: list[dict[str, Any]]) -> str:
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


def pruning(rows: list[dict[str, Any]]) -> str:
    keys = ("method", "granularity", "target", "distilled")
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
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


def vectors_speed(rows: list[dict[str, Any]]) -> str:
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


def tied_head(rows: list[dict[str, Any]]) -> str:
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


def vectors(every: list[dict[str, Any]]) -> str:
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


def _pruning_row(run: tuple[Any, ...], rows: list[dict[str, Any]]) -> tuple[str, ...]:
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


def export(rows: list[dict[str, Any]]) -> str:
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


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "codes_initialisation": codes_initialisation,
    "embeddings": embeddings,
    "export": export,
    "joint_attention": joint_attention,
    "minilm_codes": minilm_codes,
    "pruning": pruning,
    "tied_head": tied_head,
    "translation": translation,
    "vectors": vectors,
}


def filled(text: str) -> str:
    def table(match: re.Match[str]) -> str:
        name = match.group(2)
        result = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text("utf-8"))
        threads, torch = result["hardware"]["threads"], result["versions"]["torch"]
        facts = f"{threads} threads, seeds {result['seeds']}, torch {torch}"
        note = f"; {result['note']}" if "note" in result else ""
        source = f"\n`{result['command']}`; {facts}{note}.\n"
        return match.group(1) + TABLES[name](result["rows"]) + source + match.group(3)

    return MARK.sub(table, text)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    new = filled(text)
    if "--check" not in sys.argv:
        readme.write_text(new, "utf-8")
    elif new != text:
        sys.exit("README.md: a table differs from its results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
