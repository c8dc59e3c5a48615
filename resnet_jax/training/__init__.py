"""Training: the state, the step, the loop and what it keeps."""
