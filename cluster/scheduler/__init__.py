"""The central decisions, pure: a snapshot in, a plan out."""
