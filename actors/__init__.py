"""Computes: the engine, the expert memory, model execution, and the Ray shells around them.

Knows tensors and devices; decides nothing that concerns more than one process.
"""
