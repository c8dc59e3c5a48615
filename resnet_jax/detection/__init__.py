"""Object detection: Faster R-CNN on residual nets (section 4.3 of the paper)."""
