"""`axolotl ARGUMENTS` as its console script calls it, in this process instead of a launcher's.

axolotl_command.py FOLDER ARGUMENTS
"""

from __future__ import annotations

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    sys.argv = ["axolotl", *sys.argv[2:], "--launcher", "python"]
    main()
