"""The translation benchmark as a GPU affords it: d = 512, f = 2048, Multi30k and Tatoeba.

python benchmarks/gpu/translation.py --data ../shared/data --work out-gpu
"""

from __future__ import annotations

import gzip
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
SETTINGS = [
    "model.config.d_model=512",
    "model.config.encoder_ffn_dim=2048",
    "model.config.decoder_ffn_dim=2048",
    "model.config.encoder_attention_heads=8",
    "model.config.decoder_attention_heads=8",
    "model.config.init_std=0.02",
    "train.tokens_per_batch=4096",
]


def gathered(data: Path, work: Path) -> Path:
    """Write both training sets as one, and validation and test set of Multi30k beside it."""
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("de", "en"):
        parts = [data / name / f"train.{side}.gz" for name in ("multi30k", "tatoeba_deen")]
        with gzip.open(folder / f"train.{side}.gz", "wb") as out:
            for part in parts:
                out.write(gzip.decompress(part.read_bytes()).rstrip(b"\n") + b"\n")
        for name in ("val", "test_2016_flickr"):
            file = f"{name}.{side}.gz"
            (folder / file).write_bytes((data / "multi30k" / file).read_bytes())
    return folder


if __name__ == "__main__":
    at = {name: sys.argv.index(name) + 1 for name in ("--data", "--work")}
    work = Path(sys.argv[at["--work"]])
    sys.argv[at["--data"]] = str(gathered(Path(sys.argv[at["--data"]]), work))
    result = HERE.parent / "results/translation_gpu.json"
    sys.argv += ["--output", str(result), "--set", *SETTINGS]
    runpy.run_path(str(HERE.parent / "translation.py"), run_name="__main__")
