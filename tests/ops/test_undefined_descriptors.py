"""A matrix product whose address comes from a register that nothing wrote is found."""

from tests.ops.undefined_descriptors import undefined_in

RIGHT = """
/*0010*/ UMOV UR4, 0x400 ;
/*0020*/ UMOV UR5, 0x40000040 ;
/*0030*/ UIADD3.64 UR6, UR4, 0x40, URZ ;
/*0040*/ HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4].tnspB, RZ, !UPT ;
/*0050*/ HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR4].tnspB, R24, gsb0 ;
"""


def test_defined_addresses_pass():
    assert undefined_in(RIGHT) == []


def test_an_address_from_an_unwritten_register_is_found():
    wrong = RIGHT.replace("UIADD3.64 UR6, UR4", "UIADD3.64 UR6, UR8")
    assert len(undefined_in(wrong)) == 2
    through = RIGHT.replace(
        "UMOV UR4, 0x400", "IADD3 R2, P0, R3, 0x40, RZ ;\n/*0011*/ R2UR UR4, R2"
    )
    assert len(undefined_in(through)) == 2
