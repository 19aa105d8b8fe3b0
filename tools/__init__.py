"""What makes the package's data, and is not in it: run from a checkout, as ``python -m tools.demo.train``."""
