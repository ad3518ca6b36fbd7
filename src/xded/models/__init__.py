"""Recognisers: Conformer encoder, attention decoder, and the student that joins them."""
