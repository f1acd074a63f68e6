"""What runs beside requests: the scheduler and its loops. Threads, clocks and a store; no Ray."""
