"""Evaluation: metrics, the evaluator, and the evaluation of a saved run."""
