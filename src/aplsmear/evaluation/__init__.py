"""What scores are worth."""
