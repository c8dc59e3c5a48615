"""Measurements of the library; see README.md in this folder."""
