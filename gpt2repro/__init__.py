"""What the scripts and commands import: options, data, optimisation, checkpoints, tracking, evaluation and the Hub."""
