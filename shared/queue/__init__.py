"""Work that must not be lost, over Redis Streams."""
