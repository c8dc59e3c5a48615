"""Trained nets: loading, testing, predictions and features."""
