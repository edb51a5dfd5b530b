"""`python -m tests.parity FILE.npz...`"""

import sys

from tests.parity.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
