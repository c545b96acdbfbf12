"""``python tools/sweep`` from any folder: what ``bash exp.sh`` runs in its environment."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    # before anything is imported that has to be installed first
    if sys.argv[1:2] in (["-h"], ["--help"]):
        from tools.sweep.variables import help_text

        print(help_text())
        sys.exit()
    from tools.sweep.main import main

    sys.exit(main(sys.argv[1:], os.environ))
