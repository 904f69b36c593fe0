"""Names under which vLLM finds what is ours: the plugin registers it, engines are started with it."""

#: Before a base's architecture: the model that runs it with a decoder stream beside.
TWO_STREAMS = "Icarus"
#: ... the model in which tokens may pass through a few layers only.
PARTIAL_LAYERS = "DroidSpeak"
