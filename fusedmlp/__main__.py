"""python -m fusedmlp: the same as the fusedmlp command, for torchrun and for folders not on
PATH."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
