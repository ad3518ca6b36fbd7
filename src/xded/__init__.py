"""xded: distil many speaker-specific recognisers into one, and measure it on a speaker it has never heard."""

__version__ = "0.1.0"
