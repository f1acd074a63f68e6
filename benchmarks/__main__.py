"""The command `python -m benchmarks`."""

from benchmarks.runner import main

if __name__ == "__main__":  # processes that a benchmark starts import this file again
    raise SystemExit(main())
