"""The MiniLM benchmark with the training that a GPU affords: 20,000 steps instead of 3,000.

python benchmarks/gpu/minilm_codes.py --data ../shared/data --work out-gpu
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    result = HERE.parent / "results/minilm_codes_gpu.json"
    sys.argv += ["--steps", "20000", "--output", str(result)]
    runpy.run_path(str(HERE.parent / "minilm_codes.py"), run_name="__main__")
