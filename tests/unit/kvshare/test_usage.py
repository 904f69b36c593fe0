"""What a turn cost is told under the same names on both surfaces."""

from dataclasses import fields

from prefillshare.kvshare.usage import TurnUsage
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

#: Of TurnUsage, what no client sees.
INTERNAL = {"queue_s"}


def test_the_report_has_every_field_of_the_protocol():
    assert set(TurnUsage().report()) == set(pb.Usage.DESCRIPTOR.fields_by_name)


def test_nothing_that_was_measured_is_left_out():
    values = {f.name: (str(n) if f.type == "str" else n) for n, f in enumerate(fields(TurnUsage), 1)}
    told = {str(value) for value in TurnUsage(**values).report().values()}
    assert told == {str(value) for name, value in values.items() if name not in INTERNAL}


def test_the_report_fits_the_message():
    assert pb.Usage(**TurnUsage(prompt_tokens=7, own_layers="4-9").report()).own_layers == "4-9"
