"""The vLLM plugin: how shared KV is upheld on unforked vLLM. The only package that imports vLLM's internals.

Pinned to vLLM 0.32. One seam per file:

    plugin.py      entry point `vllm.general_plugins`: registers the connector
    connector.py   NIXL pull connector: contract handshake (R4), loads up to the shared prefix (R1), late reads (R6)
    scheduler.py   prefix cache limits (R2), preemption and resumption (R3)
    load_overlap.py  whether a request begins while KV is loading (DroidSpeak)
    regions.py     which cache layers move, and which of a prefill engine's a decode engine has
    models/        two_streams.py (ICaRus); own_layers.py and ecache.py (DroidSpeak)
    worker.py      worker that restores a resumed request's state
    block_keys.py  block keys that do not name the adapter (R5)
    launch.py      what an engine process is started with; quick_start.py, spawned.py: no garbage is looked for meanwhile
    nixl_handshakes.py  NIXL's handshakes are encrypted, and for holders of the deployment's key only
    nixl_cores.py  NIXL leaves the model its cores (CPU builds); gloo_loops.py: one gloo thread per process
    engine.py      AsyncLLM as a PrefillEngine / DecodeEngine; log_tail.py keeps the end of its log
    replica.py     one engine per Serve replica
    ray_node.py    where replicas listen, and the key of their channels
    frontend.py    EngineClient without an engine: tokens -> text, stop strings, log-probabilities; sampling.py beside it
    openai_app.py  vLLM's OpenAI server over the router
"""
