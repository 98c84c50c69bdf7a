"""What the standard says, as pure functions: no files, sockets, clocks, threads or settings."""
