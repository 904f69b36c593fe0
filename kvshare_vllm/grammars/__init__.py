"""Response formats: compiled in a process that can be killed, and tried before an engine gets them."""
