"""`gpt2repro bench NAME`: ours against an independent baseline, measured side by side, one JSON record each."""
