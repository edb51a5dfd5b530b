"""tensorboardX without torch, which it would import wherever torch is installed.

It does so for tensors that a run never hands over, and says itself that it can do without. Training and evaluation
start two CPU seconds earlier.
"""

from __future__ import annotations

import sys

_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
try:
    import tensorboardX
finally:
    if _hidden:
        del sys.modules["torch"]

__all__ = ["tensorboardX"]
