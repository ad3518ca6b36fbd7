"""`xded doctor`: from files to findings."""
