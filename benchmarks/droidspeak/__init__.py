"""What DroidSpeak saves, and what it costs in answers."""
