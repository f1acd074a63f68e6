"""Several attention workers and a router in virtual time.

Groundwork: routing rules weighed by replay. Missing: a command that does it for a recorded trace; benchmarks use it.
"""
