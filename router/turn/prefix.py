"""A turn's shared prefix: its tokens, and the keys of its blocks on the prefill side and on the decode side."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.layer_group import LayerGroup, block_salt
from prefillshare.kvshare.modes import get_mode
from prefillshare.router.pools.cache_index import BlockKeys


@dataclass(frozen=True)
class Prefix:
    """`keys`: block keys on the prefill side. `salt`: that of the caller's domain and request."""

    token_ids: list[int]
    keys: BlockKeys
    decoder: Decoder
    block_size: int
    salt: str | None

    @classmethod
    def of(cls, decoder: Decoder, prompt: list[int], generated: list[int], block_size: int, salt: str | None) -> Prefix:
        """The part of a prompt and of the tokens generated after it that is handed over."""
        mode = get_mode(decoder.sharing)
        shared = (prompt + generated)[: mode.handoff_tokens(len(prompt), len(generated), decoder.own_tokens)]
        keys = BlockKeys(shared, block_size, salt=salt, adapter=None if mode.shares_prefill else decoder.adapter)
        return cls(shared, keys, decoder, block_size, salt)

    def decode_keys(self, own_layers: LayerGroup | None) -> BlockKeys:
        """Block keys on the decode side, if the decoder computes these layers itself."""
        if get_mode(self.decoder.sharing).adapters_share_blocks:
            return self.keys
        salt = block_salt(self.salt, own_layers)
        return BlockKeys(self.token_ids, self.block_size, salt=salt, adapter=self.decoder.adapter)
