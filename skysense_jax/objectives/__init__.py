"""Training objectives: losses, what follows an update, and how their parameters are split."""
