"""Which worker a request goes to, and where it goes when that one is lost."""
