"""What a few recordings of a new speaker are worth."""
