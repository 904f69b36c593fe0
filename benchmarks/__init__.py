"""Measurements, one module or folder per question. Each prints what it does, explains its options with --help, and writes its
figures with hardware, versions and command to benchmarks/results/.

    agents      what is sharing worth, against a cache per model and against stock vLLM? (plan: on other machines, estimated)
    accuracy    what does sharing cost in right answers?
    overhead    what does our path cost, against a bare engine and stock vLLM?
    droidspeak  what does recomputing a few layers save?
    icarus      what does the second stream cost, and what does it save?
    faults      is a turn lost when processes die or hang?
    soak        what goes wrong if everything fails that can, for hours?
    neighbours  what does one tenant's worst request cost the others?
    locality    how much of a prompt is found cached when sessions switch models?
    overload    does goodput hold under overload?
    eager       how much time does prefilling responses ahead save the next turn?
    router      what does one placement cost?
    accounts    what do a tenant's accounts in Redis cost a turn?
    training    how fast is cache-conditioned training?

shared/ holds what they have in common.
"""
