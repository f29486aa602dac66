"""Models on their way out to the Hub and other programs, and in from other projects."""
