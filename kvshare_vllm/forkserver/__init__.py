"""Processes that start with vLLM already imported: one server imports it once, and forks a process for each that asks.

Importing vLLM is some 15 seconds of work on a core, and a small deployment has five processes that do it: the router, and two
for each engine. If a deployment runs in a cluster of its own on this machine, its replicas are forked from a server that has
imported vLLM already, and an engine's second process is forked from the replica's first one while that has no threads yet:

    server --fork--> replica --fork--> spare, which becomes the engine's process
      ^ socket          : represents it to Ray
    stand_in -----------:

Ray starts the stand-in where it would start Python (`py_executable` of the runtime environment). Without a server the
stand-in becomes Python, and everything starts as it does elsewhere. The server only imports: nothing of Ray's or vLLM's runs in
it, and what libraries have initialised at import is initialised anew in the forked processes (openmp.py).
"""
