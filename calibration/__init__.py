"""Calibration: fit what belongs to a model (a gate's references), and measure what pruning costs. Needs torch."""
