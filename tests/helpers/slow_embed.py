"""The command line with a pause after each result, so that a test can kill it between two."""

from __future__ import annotations

import time
from typing import Any

from dilated_attention_pytorch.cli import main
from dilated_attention_pytorch.models.slide.results import ResultFolder

write = ResultFolder.write


def slowly(self: ResultFolder, *arguments: Any) -> None:
    write(self, *arguments)
    time.sleep(0.3)


ResultFolder.write = slowly  # type: ignore[method-assign]
if __name__ == "__main__":
    main()
