"""Checkpoints: written, found, verified, restored. Nothing is ever unpickled."""
