"""``python seq1f1b_tools/sweep`` from any folder: what ``bash exp.sh`` runs in its environment."""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    # the folder itself holds modules with everyday names, such as report
    sys.path[:] = [os.path.dirname(os.path.dirname(here)), *(p for p in sys.path if p != here)]

    # before anything is imported that has to be installed first
    if sys.argv[1:2] in (["-h"], ["--help"]):
        from seq1f1b_tools.sweep.settings import help_text

        print(help_text())
        sys.exit()
    from seq1f1b_tools.sweep.main import main

    sys.exit(main(sys.argv[1:], os.environ))
