"""What faults cost, and whether any loses a turn."""
