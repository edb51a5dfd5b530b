"""The commands of `skysense-jax`: one file each with its arguments, the printed text and the exit code."""
