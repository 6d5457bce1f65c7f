"""Messages between processes: the trio-ZeroMQ bridge, transports, the codec and sessions."""
