"""One file per command; `python -m gpt2repro NAME` imports the one it needs."""
