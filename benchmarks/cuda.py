"""Runs `gpu.py`: ``python benchmarks/cuda.py [--device cpu --small]``.

PyTorch imports NVIDIA's package ``cuda``, and a script's folder stands first on the path: whoever imports this file by
that name, from any script of this folder, is led on to the package.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    import gpu

    gpu.main()
else:
    __path__ = [str(Path(place, "cuda")) for place in sys.path if Path(place, "cuda").is_dir()]
