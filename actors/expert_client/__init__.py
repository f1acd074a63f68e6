"""An attention worker's side of expert hosts: which host gets which rows, and how they get there."""
