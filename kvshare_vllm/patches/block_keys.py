"""Block keys of a shared pool (R5). Seam: vllm/v1/core/kv_cache_utils.py, `_gen_lora_extra_hash_keys`.

vLLM mixes an adapter's name and path into the key of every block, so that adapters in one engine never share
blocks. In a mode whose offered blocks are base KV whatever adapter asked, the copies per adapter are redundant.
Tenants stay apart: the cache salt is a key of its own and is not touched (R7).

Goes when: vLLM lets an engine choose whether the adapter enters the key of a block.
"""

from __future__ import annotations

from vllm.v1.core import kv_cache_utils


def share_blocks_between_adapters() -> None:
    """From now on, block keys made in this process do not name the adapter. One engine per process."""
    kv_cache_utils._gen_lora_extra_hash_keys = lambda request: []
