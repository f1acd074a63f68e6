"""Makes fixtures known here."""

from kernel_values import generator, native  # noqa: F401
