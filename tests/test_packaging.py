from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


_SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "out", "site")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel from a clean copy, where no earlier build has left anything, and what was printed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=_SKIPPED)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), "."]
    environ = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        command, cwd=source, capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, str]) -> Path:
    return built[0]


def test_a_build_prints_no_warning(built: tuple[Path, str]) -> None:
    lines = built[1].splitlines()
    assert [line for line in lines if re.search("warning|deprecat", line, re.IGNORECASE)] == []


def test_the_metadata_is_complete(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
    found = email.message_from_bytes(archive.read(name))
    for field in ("Summary", "Author", "Keywords", "License-Expression", "Requires-Python"):
        assert found[field], field
    assert found["Description-Content-Type"] == "text/markdown"
    assert len(found.get_all("Classifier", [])) >= 10
    assert {"demo", "eval", "quantize", "onnx"} <= set(found.get_all("Provides-Extra", []))
    assert len(found.get_payload()) > 1000


def test_the_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"plmcc"}


def test_the_wheel_holds_every_pass_recipe_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [f"plmcc/{file.relative_to(ROOT)}" for file in ROOT.glob("passes/**/*.py")]
    sources += [f"plmcc/{file.relative_to(ROOT)}" for file in ROOT.glob("recipes/**/*.yaml")]
    sources += [str(file.relative_to(ROOT)) for file in ROOT.glob("plmcc/**/*.py")]
    assert len(sources) > 150
    assert {*sources, "plmcc/py.typed"} <= names


def test_an_installed_wheel_runs_and_passes_have_one_name(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*command, str(wheel)], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import plmcc, plmcc.catalog.registry as catalog\n"
        f"assert plmcc.__file__.startswith({str(tmp_path)!r}), plmcc.__file__\n"
        "assert 'compositional_codes' in catalog.names()\n"
        "found = catalog.load('compositional_codes')\n"
        "assert found.__module__ == 'plmcc.passes.compositional_codes'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_passes_cannot_be_imported_under_another_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "the passes are the package plmcc.passes" in done.stderr


def test_importing_plmcc_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, plmcc; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve_and_are_documented() -> None:
    import plmcc

    for name in plmcc.__all__:
        value = getattr(plmcc, name)
        assert value.__doc__, name


@pytest.mark.parametrize("order", ["import plmcc, transformers", "import transformers, plmcc"])
def test_artifacts_are_registered_in_either_order_of_imports(order: str) -> None:
    code = (
        f"{order}\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'plmcc' in CONFIG_MAPPING and 'plmcc' in AUTO_QUANTIZER_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
