"""The expert memory of one process: arenas of fast memory, links between tiers, one transfer queue, the store."""
