"""What the loop calls. Knows no file format but the run's own log."""
