"""setuptools.build_meta, with one plain sentence where setuptools is missing or too old."""

import sys

AT_LEAST = (70, 1)  # bdist_wheel has come with setuptools since

try:
    import setuptools
except ImportError:
    sys.exit(
        "fusedmlp: setuptools is not installed and build isolation is off; "
        "run: pip install setuptools ninja"
    )
if tuple(int(n) for n in setuptools.__version__.split(".")[:2]) < AT_LEAST:
    sys.exit(
        f"fusedmlp: setuptools 70.1 or newer is needed, this is {setuptools.__version__}; "
        "run: pip install --upgrade setuptools"
    )

from setuptools.build_meta import *  # noqa: E402, F403
