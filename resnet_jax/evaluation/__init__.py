"""Exact evaluation."""
