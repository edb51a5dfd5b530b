"""A run: its plan, state and step, where it starts, its folder, checkpoints and metrics, and how it ends."""
