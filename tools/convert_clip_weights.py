"""Runs `vop convert` from a clone, without the package installed: see vop_jax/convert.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vop_jax.convert import main

if __name__ == "__main__":
    sys.exit(main())
