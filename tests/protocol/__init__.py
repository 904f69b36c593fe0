"""The protocol of the system as small state machines, which are explored whole: what may happen, and what may never be so."""
