"""``python -m mmbridge`` is the same as ``mmbridge``."""

import sys

from mmbridge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
