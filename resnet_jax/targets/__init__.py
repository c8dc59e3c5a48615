"""Chips: their published figures, and compilation for them from any machine."""
