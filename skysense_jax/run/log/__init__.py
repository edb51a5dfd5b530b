"""What a run writes while it goes: metrics as JSON lines and TensorBoard, traces of steps."""
