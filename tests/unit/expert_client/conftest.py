"""Makes fixtures known here."""

from dispatch_parts import compute, everything, experts, make_worker  # noqa: F401
