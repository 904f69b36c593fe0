"""`prefillshare prove`: shows on the machine at hand that serving is exact, and what it is worth.

Each stage runs in a process of its own (stage.py) under a supervisor that bounds it and keeps what it has reported so far
(supervisor.py). All but one start engines without Ray and without a router (engines.py);
`system` starts a whole deployment.
"""
