"""Ray Serve deployment around KV-consuming engines."""
