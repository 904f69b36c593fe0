"""What a user touches: command line, Python client, app builder, demo."""

__version__ = "0.1.0"
