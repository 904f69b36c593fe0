"""The vLLM plugin: how shared KV is upheld on unforked vLLM. The only package that imports vLLM's internals.

Pinned to vLLM 0.32. One seam per file; docs/architecture.md lists them.

    plugin.py   entry point `vllm.general_plugins`: registers our extensions
    surface/    vLLM's OpenAI server over the router: tokens -> text, refusals, bounds on requests
    engine/     AsyncLLM as a PrefillEngine or DecodeEngine, one per Serve replica; scheduler (R2, R3), worker, KV events
    transfer/   NIXL pull connector: contract handshake (R4), loads up to the shared prefix (R1), late reads (R6)
    models/     families.py: which models an engine runs; two_streams.py (ICaRus); own_layers.py and ecache.py (DroidSpeak)
    grammars/   response formats, tried before an engine gets them
    patches/    changes made at run time to vLLM and to the libraries below it
"""
