"""What `prefillshare check` says of how much may be kept."""

import pytest

from prefillshare.kept_budget import capacity_tokens, kept_budget
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.contract import KVShape
from prefillshare.router.tenants import Tenant

SHAPE = KVShape(layers=4, kv_heads=2, head_size=32, rope="", vocab_size=100)
#: float32: 4 layers x keys and values of 2 heads of 32.
TOKEN_BYTES = 4 * 2 * 2 * 32 * 4
GIB = 1000 * TOKEN_BYTES / 2**30


def deployment(prefill: dict | None, *decode: dict, **router) -> Deployment:
    pools = [{"pool": f"p{number}", "kv_cache_gib": GIB, **one} for number, one in enumerate(decode)]
    return Deployment.model_validate(
        {"base": {"model": "m", "dtype": "float32"}, "prefill": prefill, "decode": pools, "router": router}
    )


ADAPTERS = {"adapters": {"a": "x"}}


@pytest.mark.parametrize(
    ("prefill", "decode", "tokens"),
    [
        ({"replicas": 2, "kv_cache_gib": 4 * GIB}, [{"model": "full"}], 8000),
        ({"kv_cache_gib": 4 * GIB}, [ADAPTERS], 5000),
        ({"kv_cache_gib": 4 * GIB}, [ADAPTERS | {"local_prefill": "never"}], 4000),
        ({"replicas": 0}, [ADAPTERS, {"adapters": {"b": "y"}, "sharing": "icarus", "replicas": 2}], 3000),
        ({"replicas": 3, "autoscale": {"min_replicas": 3, "max_replicas": 9}, "kv_cache_gib": GIB}, [{"model": "full"}], 3000),
        (None, [{"model": "own", "sharing": "none"}], 0),
    ],
)
def test_the_engines_that_make_base_kv_keep(prefill, decode, tokens):
    assert capacity_tokens(deployment(prefill, *decode), SHAPE) == pytest.approx(tokens, abs=4)


def said(tenants: dict[str, int | None], **router) -> list[str]:
    known = {
        name: Tenant(keys=(f"{name}-0123456789abcdef",), max_kept_tokens=tokens) for name, tokens in tenants.items()
    }
    return list(kept_budget(deployment({"kv_cache_gib": 4 * GIB}, {"model": "full"}, **router), SHAPE, known))


def test_the_share_and_the_number_both_hold():
    assert said({}) == ["kept contexts: at most 2,000 tokens of all tenants together"]
    assert said({}, max_kept_tokens=500) == ["kept contexts: at most 500 tokens of all tenants together"]
    assert said({}, max_kept_share=0) == ["kept contexts: at most 0 tokens of all tenants together"]


def test_budgets_that_do_not_fit_are_named():
    (_, warning) = said({}, max_kept_tokens=9000)
    assert warning == (
        "warning: router.max_kept_tokens is 9,000, and router.max_kept_share allows 2,000: raise the share or kv_cache_gib, "
        "or lower it"
    )
    (_, warning) = said({"ferry": 2500, "harbour": None})
    assert warning == "warning: max_kept_tokens of ferry is more than all tenants together may keep"
    (_, warning) = said({"ferry": 1500, "harbour": 1500})
    assert warning.startswith("warning: the tenants' max_kept_tokens add up to 3,000: not all of them")
    assert len(said({"ferry": 1000, "harbour": 1000})) == 1
