"""axolotl_command.py FOLDER ARGUMENTS: `axolotl ARGUMENTS` as its console script calls it, which
trains in this process and not in a launcher's."""

from __future__ import annotations

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    sys.argv = ["axolotl", *sys.argv[2:], "--launcher", "python"]
    main()
