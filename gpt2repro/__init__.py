"""What the scripts and commands import, in rooms that follow the way of the data."""
