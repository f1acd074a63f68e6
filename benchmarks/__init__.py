"""Measurements of what the project promises: `python -m benchmarks` lists them, `python -m benchmarks NAME` runs one.

A folder for each topic; its `__init__` declares the topic's benchmarks, and benchmark NAME lies in the file NAME.py.
What several share is in `shared/`.
"""
