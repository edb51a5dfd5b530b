"""Numerical parity with the reference PyTorch code: `python -m tests.parity FILE.npz...` (see tests.parity.command)."""
