"""What teachers say about recordings: extracted once, stored as top-k, aggregated once."""
