"""One program in a process of its own: `python -m chaos.one train FOLDER`."""

import sys
from pathlib import Path

from chaos.programs import PROGRAMS

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](Path(sys.argv[2]))
