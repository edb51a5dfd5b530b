"""`python -m experiments.real_samples`: see `experiments.real_samples.convert`."""

import sys

from experiments.real_samples.convert import main

if __name__ == "__main__":
    sys.exit(main())
