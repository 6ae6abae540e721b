"""What hardware could do."""
