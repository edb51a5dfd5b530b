"""Accelerators and their compiler: data sheets, flags, and reading a compiled program."""
