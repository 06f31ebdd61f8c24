"""Mistakes in recipes: what the tests check, and what the documentation shows of each code."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = "plmcc: 1\npasses: [compositional_codes]\n"


@dataclass
class Mistake:
    """A recipe with `§` before the faulty token; `cure` is part of what is allowed or advised."""

    text: str
    code: str
    hint: str = ""
    count: int = 1

    @property
    def location(self) -> str:
        lines = self.text.partition("§")[0].split("\n")
        return f"r.yaml:{len(lines)}:{len(lines[-1]) + 1}"


def body(text: str, code: str, hint: str = "", count: int = 1) -> Mistake:
    return Mistake(HEAD + text, code, hint, count)


def option(text: str, code: str, hint: str = "") -> Mistake:
    return Mistake(f"plmcc: 1\npasses:\n  - compositional_codes:\n      {text}\n", code, hint)


def search(text: str, code: str, hint: str = "") -> Mistake:
    return body(
        f"train: {{data: {{train: a.txt}}, distill: {{logits: 1}}}}\nsearch: {text}\n", code, hint
    )


def train(text: str, code: str, hint: str = "") -> Mistake:
    return body(f"train:\n  data: {{train: a.txt}}\n  {text}\n", code, hint)


MISTAKES = [
    # the version
    Mistake("§name: x\n", "PLM102", "add the line `plmcc: 1`"),
    Mistake("plmcc: §2\nanything: 1\n", "PLM106", "write `plmcc: 1`"),
    Mistake("plmcc: §'1'\n", "PLM106", "1"),
    Mistake("plmcc: §1.0\n", "PLM106", "1"),
    Mistake("plmcc: §true\n", "PLM106", "1"),
    # YAML
    Mistake("§just text\n", "PLM103", "begin with `plmcc: 1`"),
    Mistake("§- a list\n", "PLM103", "begin with `plmcc: 1`"),
    Mistake("plmcc: 1\nname: a§: b\n", "PLM010", "quote a text"),
    Mistake("plmcc: 1\npasses: [a, b\n§", "PLM010", "bracket `[` is not closed"),
    Mistake("plmcc: 1\nlower: {to: [compile]\n§", "PLM010", "brace `{` is not closed"),
    Mistake('plmcc: 1\nname: "abc\n§', "PLM010", "a quote is not closed"),
    Mistake("plmcc: 1\nname: §@x\n", "PLM010", "quote a text"),
    Mistake("plmcc: 1\nname: §*codes\n", "PLM010", "quote a text"),
    Mistake('plmcc: 1\nname: "\\U§ffffffff"\n', "PLM010"),
    Mistake("plmcc: 1\ntrain:\n§\tdata: x\n", "PLM011", "indent with spaces"),
    Mistake("plmcc: 1\nname: a§\x07b\n", "PLM012", "remove it"),
    Mistake('plmcc: 1\nname: §"a\\0b"\n', "PLM012"),
    Mistake('plmcc: 1\nname: §"\\ud800"\n', "PLM012"),
    body("name: a\n§name: b\n", "PLM013", "keep one"),
    option("{codebooks: 8, §codebooks: 9}", "PLM013", "keep one"),
    Mistake(HEAD + "§---\nplmcc: 1\n", "PLM014", "remove the second"),
    Mistake("plmcc: 1\nname: §!!python/object:os.system x\n", "PLM015"),
    Mistake("plmcc: 1\nname: §!env HOME\n", "PLM015"),
    Mistake("plmcc: 1\nname: §!!str 5\n", "PLM015"),
    Mistake("plmcc: 1\npasses: §!!set {a}\n", "PLM015"),
    body("train: &t {data: {train: a}}\nlower: {§<<: *t}\n", "PLM016", "write the keys out"),
    body("§~: x\n", "PLM019", "quote the key"),
    body("§true: x\n", "PLM019", "quote the key"),
    body("? §[a, b]\n: x\n", "PLM019"),
    body("seed: §.nan\n", "PLM020"),
    body("seed: §-.inf\n", "PLM020"),
    body("train: {data: {train: a}, distill: {logits: §1e999}}\n", "PLM020"),
    body(f"seed: §{'9' * 400}\n", "PLM020"),
    # the top level
    body("§passses: []\n", "PLM101", "did you mean `passes`?"),
    body("§Seed: 1\n", "PLM101", "did you mean `seed`?"),
    body("§zzzzzz: 1\n", "PLM101", "plmcc, name, model"),
    body("§5: 1\n", "PLM101"),
    body("name: §a b\n", "PLM107", "begin with a letter"),
    body("name: §../x\n", "PLM107", "begin with a letter"),
    body("name: §7\n", "PLM103", 'quote it: "7"'),
    body("model: §[a]\n", "PLM103", "text"),
    body("task: §text-clasification\n", "PLM105", "did you mean `text-classification`?"),
    body('seed: §"3"\n', "PLM103", "write it without quotes"),
    body("seed: §1_000\n", "PLM103", "1000"),
    body("seed: §2.0\n", "PLM103", "write 2"),
    body("seed: §true\n", "PLM103", "a whole number"),
    body("seed: §-1\n", "PLM104", "at least 0"),
    body("seed:§\n", "PLM103", "a whole number"),
    # passes
    Mistake("§plmcc: 1\nname: x\n", "PLM108", "add `passes:`"),
    Mistake("plmcc: 1\npasses: §[]\n", "PLM108", "at least one"),
    Mistake("plmcc: 1\npasses: §compositional_codes\n", "PLM103", "write [compositional_codes]"),
    Mistake(
        "plmcc: 1\npasses:\n  §compositional_codes: {}\n", "PLM103", "begin each item with `- `"
    ),
    Mistake("plmcc: 1\npasses: [§compositional_code]\n", "PLM110", "`compositional_codes`"),
    Mistake("plmcc: 1\npasses:\n  - §Compositional-Codes: {}\n", "PLM110", "`compositional_codes`"),
    Mistake("plmcc: 1\npasses:\n  - §xyz:\n      a: 1\n", "PLM110", "`plmcc passes` lists them"),
    Mistake("plmcc: 1\npasses: [§_bits]\n", "PLM110"),
    Mistake("plmcc: 1\npasses: [§3]\n", "PLM111", "- name"),
    Mistake("plmcc: 1\npasses: [§{}]\n", "PLM111", "- name"),
    Mistake("plmcc: 1\npasses:\n  -§\n", "PLM111", "- name"),
    Mistake("plmcc: 1\npasses: [§[compositional_codes]]\n", "PLM111"),
    Mistake("plmcc: 1\npasses: [compositional_codes: §3]\n", "PLM103", "a mapping"),
    Mistake("plmcc: 1\npasses: [§quantize: int8]\n", "PLM110", "`quantized_linears`"),
    Mistake(
        "plmcc: 1\npasses:\n  - compositional_codes:\n    §codebooks: 8\n",
        "PLM111",
        "indent the options deeper",
    ),
    Mistake(
        "plmcc: 1\npasses:\n  - compositional_codes: {}\n    §other: {}\n",
        "PLM111",
        "begin every pass with `- `",
    ),
    option("§codeboks: 8", "PLM101", "did you mean `codebooks`?"),
    option('codebooks: §"16"', "PLM103", "write it without quotes"),
    option("codebooks: §16.0", "PLM103", "write 16"),
    option("codebooks: §[16]", "PLM103", "a whole number"),
    option("codebooks: §0", "PLM104", "at least 1"),
    option("codewords: §65537", "PLM104", "at most 65536"),
    option("learning_rate: §0", "PLM104", "more than 0"),
    option("initialization: §papr", "PLM105", "did you mean `paper`?"),
    option("{initialization: product, beam: §4}", "PLM107"),
    option("targets: §5", "PLM103", "text or a list"),
    option("targets: [a, §5]", "PLM103", 'quote it: "5"'),
    option("targets: §re:(", "PLM107", "backslash"),
    option('targets: [a, §"re:a[", b]', "PLM107", "backslash"),
    option("targets: §re:a{99999999999}", "PLM107", "backslash"),
    option("expect: §many", "PLM103", "a whole number"),
    # training
    body("train: §fast\n", "PLM103", "a mapping"),
    body("§train: {}\n", "PLM102", "add `data: ...`"),
    body("train:\n  §data: {eval: a.txt}\n", "PLM102", "add `train: ...`"),
    body("train: {data: {train: §''}}\n", "PLM104", "at least 1"),
    body("train: {data: {train: §[]}}\n", "PLM104", "at least 1"),
    body("train: {data: {train: §'hub:'}}\n", "PLM107", "write hub:name"),
    body("train: {data: {train: a, max_length: §3}}\n", "PLM104", "at least 4"),
    body("train: {data: {train: a, limit: §0}}\n", "PLM104", "more than 0"),
    body("train: {data: {train: a, §txt: b}}\n", "PLM101", "did you mean `text`?"),
    body("train: {data: {train: a, synthetic: §{}}}\n", "PLM108", "write `train: synthetic`"),
    train("trainable: §pases", "PLM105", "did you mean `passes`?"),
    train("dropout: §off", "PLM103", "write false"),
    train("distill: §{}", "PLM108", "set one of logits"),
    train("distill: §{task: 1, logits: 0}", "PLM108", "set one of"),
    train("distill: {logits: 1, layers: §{0: 1}}", "PLM108", "set `hidden_states`"),
    train("distill: {logits: §-1}", "PLM104", "at least 0"),
    train("distill: {logits: 1, teacher: §orginal}", "PLM107", "write `original`"),
    train("distill: {logits: 1, teacher: §Original}", "PLM107", "write `original`"),
    train("distill: {logits: 1, temperature: §0}", "PLM104", "more than 0"),
    train("distill: {hidden_states: 1, layers: {§a: 1}}", "PLM103", "a whole number"),
    train("distill: {hidden_states: 1, layers: {0: §-1}}", "PLM104", "at least 0"),
    train("arguments: {§num_train_epoch: 1}", "PLM120", "did you mean `num_train_epochs`?"),
    train("arguments: {§seed: 1}", "PLM121", "write `seed:` at the top"),
    train("arguments: {§push_to_hub: true}", "PLM121", "uploads nothing"),
    train("arguments: {learning_rate: §fast}", "PLM103", "a number"),
    train("arguments: {bf16: §yes}", "PLM103", "write true"),
    train("arguments: {max_steps: §1e3}", "PLM103", "write 1000"),
    train("arguments: {max_steps: §0}", "PLM108", "remove `train`"),
    train("arguments: {num_train_epochs: §0}", "PLM108", "remove `train`"),
    train("arguments: {eval_strategy: §epochs}", "PLM105", "did you mean `epoch`?"),
    train("arguments: §[]", "PLM103", "a mapping"),
    # evaluation and lowering
    body("evaluate: §{metric: f1, data: a}\n", "PLM103", "begin each item with `- `"),
    body("evaluate: [{metric: §acuracy, data: a}]\n", "PLM105", "did you mean `accuracy`?"),
    body("evaluate: [§{metric: f1}]\n", "PLM102", "add `data: ...`"),
    body("lower: {to: §compile}\n", "PLM103", "write [compile]"),
    body("lower: {to: [compile, §onx]}\n", "PLM105", "did you mean `onnx`?"),
    body("lower: §{to: []}\n", "PLM108", "add `to: [compile]` or `quantize`"),
    # what a search varies
    search(
        "{§passes.0.compositional_codes.codeboks: [1, 2]}", "PLM101", "did you mean `codebooks`?"
    ),
    search("{passes.0.compositional_codes.beam: [1, §x]}", "PLM103", "a whole number"),
    search("{passes.0.compositional_codes.beam: {low: §0, high: 3}}", "PLM104", "at least 1"),
    search("{passes.0.compositional_codes.beam: {low: 1, high: §3.5}}", "PLM103", "a whole number"),
    search("{passes.0.compositional_codes.beam: {low: 1, high: 3, step: §.5}}", "PLM103", "whole"),
    search("{§passes.1.compositional_codes.beam: [1, 2]}", "PLM131", "0 to 0"),
    search("{§passes.0.compositional_code.beam: [1, 2]}", "PLM131", "`compositional_codes`"),
    search("{§trian.arguments.max_steps: [1, 2]}", "PLM131", "did you mean `train`?"),
    search("{§train.arguments.maxsteps: [1, 2]}", "PLM120", "did you mean `max_steps`?"),
    search("{§passes..beam: [1, 2]}", "PLM130"),
    search("{seed: [1, 2, §1]}", "PLM107", "keep one"),
    search("{seed: §[1]}", "PLM104", "at least 2"),
    search("{seed: §1}", "PLM103", "a list or a mapping"),
    search("§{}", "PLM104", "at least 1"),
    search("{seed: {low: §3, high: 2}}", "PLM107", "swap them"),
    search("{seed: {low: §0, high: 2, log: true}}", "PLM107", "remove `log`"),
    search("{seed: {low: 1, high: 4, log: true, step: §2}}", "PLM108", "keep one"),
    search("{seed: {low: 1, high: 4, step: §4}}", "PLM107", "lower it"),
    search("{§seed: {low: 1}}", "PLM102", "add `high"),
    # stages
    body("stages: §[{name: a, passes: [compositional_codes]}]\n", "PLM108", "into a stage"),
    Mistake("plmcc: 1\nstages: §[]\n", "PLM108", "add `stages:`"),
    Mistake(
        "plmcc: 1\nstages:\n"
        "- {name: a, train: &t {data: {train: synthetic}}}\n"
        "- {name: §a, train: *t}\n",
        "PLM107",
        "rename one",
    ),
    Mistake("plmcc: 1\nstages: [{name: §a}]\n", "PLM108", "add `passes` or `train`"),
    Mistake("plmcc: 1\nstages: [§{passes: []}]\n", "PLM102", "add `name: ...`"),
    Mistake("plmcc: 1\nstages: [{name: a, passes: [§b]}]\n", "PLM110"),
]


_CODES = "plmcc: 1\npasses: [compositional_codes: {codebooks: 2, codewords: 4, rounds: 0}]\n"
_FIGURE = "task: sentence-similarity\nevaluate: [{metric: spearman, data: pairs.csv}]\n"
FILES: dict[str, bytes] = {
    "recipe.yaml": _CODES.encode(),
    "latin.yaml": "plmcc: 1\nname: Übung\n".encode("latin-1"),
    "empty.yaml": b"",
    "large.yaml": b"#" * (1 << 21),
    "itself.yaml": b"plmcc: 1\nname: &a [*a]\n",
    "long.yaml": b"plmcc: 1\nname: [" + b"x, " * 20_000 + b"]\n",
    "expected.yaml": _CODES.replace("rounds: 0", "rounds: 0, expect: 2").encode(),
    "too_large.yaml": _CODES.replace("codewords: 4", "codewords: 99").encode(),
    "twice.yaml": _CODES.replace("}]", "}, binary_embedding: {bits: 8}]").encode(),
    "text.yaml": (_CODES + "train: {data: {train: sentence.txt}, distill: {logits: 1}}\n").encode(),
    "sentences.txt": b"one sentence a line\n",
    "pairs.yaml": (_CODES + _FIGURE).encode(),
    "pairs.csv": b"label,text_a,text_b\nalike,w1 w2,w3\n",
    "metric.yaml": (_CODES + _FIGURE.replace("spearman", "exact_match")).encode(),
    "broken.py": b"import plmcc.apy\n",
}
"""What the commands in `RUNS` find where they run, beside the directory `model`: a tiny BERT."""
RUNS = [
    ("PLM001", "check recip.yaml"),
    ("PLM002", "check model"),
    ("PLM004", "check large.yaml"),
    ("PLM005", "check latin.yaml"),
    ("PLM006", "check empty.yaml"),
    ("PLM017", "check itself.yaml"),
    ("PLM018", "check long.yaml"),
    ("PLM112", "check-pass broken.py:Broken"),
    ("PLM201", "match model encoder.layer.*.querry"),
    ("PLM202", "plan expected.yaml model"),
    ("PLM203", "plan too_large.yaml model"),
    ("PLM204", "plan twice.yaml model"),
    ("PLM301", "apply text.yaml model -o small"),
    ("PLM302", "apply pairs.yaml model -o small"),
    ("PLM303", "apply metric.yaml model -o small"),
    ("PLM401", "plan recipe.yaml modell"),
    ("PLM402", "verify model"),
    ("PLM501", "apply recipe.yaml model -o pairs.csv"),
    ("PLM502", "search recipe.yaml model --target size<=9kB -o found"),
]
"""Codes that are not about the text of a recipe, each with a command that ends with it."""
