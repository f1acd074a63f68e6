"""Decides and serves: configuration, front ends, statistics, the command line. No torch here.

Knows requests, plans and numbers; knows nothing of tensors. What computes lives in `actors`.
"""
