"""Training and measuring the reader."""
