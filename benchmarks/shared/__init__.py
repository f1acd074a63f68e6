"""What several benchmarks share: reports and their pages, the machine, models, prompts, traces, engines, servers."""
