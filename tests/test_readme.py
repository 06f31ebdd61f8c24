from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from plmcc.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_recipes_are_valid() -> None:
    assert len(blocks("yaml")) == 5
    for text in blocks("yaml"):
        assert all(stage.passes for stage in parse_recipe(text).steps())


def test_the_commands_exist() -> None:
    shown = " ".join(blocks("console"))
    for command in re.findall(r"plmcc (\w+)", shown):
        done = subprocess.run(
            [sys.executable, "-m", "plmcc.cli", command, "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, command


def test_the_map_names_files_that_exist() -> None:
    table = README.split("## Map")[1].split("##")[0]
    names = re.findall(r"`([\w*./]+)`", table)
    folders = (ROOT, ROOT / "plmcc", ROOT / "tests")
    files = [name for name in names if "." in name or "/" in name]
    assert files
    assert [name for name in files if not any(list(f.glob(name)) for f in folders)] == []


USE = """
import sys, torch, plmcc
from tiny import inputs, tiny
from my_module import Int8Embedding
for name in ("bert", "gpt2", "t5"):
    model, batch = tiny(name), inputs(name)
    before = model(**batch).logits.detach()
    plmcc.Pipeline([Int8Embedding()])(model)
    after = model(**batch).logits.detach()
    assert 0 < (before - after).abs().max() < 0.1 * before.abs().max(), name
    model.save_pretrained(sys.argv[1])
    again = plmcc.load(sys.argv[1], attn_implementation="eager")
    assert torch.allclose(again(**batch).logits, after, atol=1e-5), name
print("done")
"""


def test_the_pass_in_the_readme_works_as_a_package(tmp_path: Path) -> None:
    source = next(block for block in blocks("python") if "class Int8Embedding" in block)
    (tmp_path / "my_module.py").write_text(source, encoding="utf-8")
    info = tmp_path / "my_pass-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-pass\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[plmcc.passes]\nmy_pass = my_module:Int8Embedding\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", USE, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "plmcc.cli", "passes"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "my_pass" in listed.stdout


def test_the_tables_match_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
