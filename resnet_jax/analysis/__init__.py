"""Analyses of nets, and the figures of runs."""
