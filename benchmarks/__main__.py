"""Lists the benchmarks, or runs one: `python -m benchmarks [NAME [ITS OPTIONS]]`.

Each is a script of its own, `benchmarks/NAME.py`; those that need several ranks are started with torchrun, two ranks
unless RANKS says otherwise. `python -m benchmarks NAME --help` says what a benchmark takes.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Parts of the others: nothing to run.
PARTS = {"__init__", "__main__", "common", "generation_gpu", "patterns_chart", "quality_chart", "workloads"}


def benchmarks() -> dict[str, str]:
    """Name and first line of each."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in PARTS:
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = doc.partition("\n")[0]
    return found


def command(name: str, arguments: list[str]) -> list[str]:
    """What runs a benchmark."""
    script = FOLDER / f"{name}.py"
    launcher = [sys.executable]
    if f"torchrun --standalone --nproc-per-node 2 benchmarks/{name}.py" in script.read_text(encoding="utf-8"):
        ranks = os.environ.get("RANKS", "2")
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return [*launcher, str(script), *arguments]


def main() -> int:
    known = benchmarks()
    if len(sys.argv) == 1 or sys.argv[1] in {"-h", "--help"}:
        print(__doc__)
        width = max(map(len, known))
        print("\n".join(f"  {name:<{width}}  {line}" for name, line in known.items()))
        return 0
    name, *arguments = sys.argv[1:]
    if name not in known:
        print(f"expected one of {', '.join(known)}, got {name!r}", file=sys.stderr)
        return 2
    return subprocess.run(command(name, arguments), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
