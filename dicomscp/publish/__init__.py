"""Where documents are published to."""
