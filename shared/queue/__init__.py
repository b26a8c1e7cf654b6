"""Work queues over Redis Streams."""
