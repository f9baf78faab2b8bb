"""Who starts it: the commands. The only place with flags, printing and processes."""
