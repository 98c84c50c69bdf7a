"""The durable parts that hold instances: archive, store, journal, index."""
