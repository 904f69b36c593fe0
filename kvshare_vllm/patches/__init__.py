"""Changes made at run time to vLLM and the libraries below it; each file says when it goes."""
