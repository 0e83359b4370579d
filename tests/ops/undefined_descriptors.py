"""Find products that read shared memory at an undefined address, without a GPU.

ptxas 12.8, which Triton 3.6 brings, may compute the descriptor of a Hopper matrix product (HGMMA)
from a register that nothing wrote: the kernel then ends with an illegal memory access.
"""

import re
import subprocess
import tempfile

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);")
REGISTER = re.compile(r"\b(UR|R)(\d+)\b")
# What an address passes through.
PASSES = ("MOV", "UMOV", "IMAD", "IADD3", "UIADD3", "VIADD", "R2UR")


def undefined_descriptors(cubin: bytes) -> list[str]:
    """HGMMA instructions whose descriptors come from a register that was never written."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return undefined_in(listing)


def undefined_in(listing: str) -> list[str]:
    written: set[tuple[str, int]] = set()
    undefined: set[tuple[str, int]] = set()
    found = []
    for match in LINE.finditer(listing):
        name, operands = match.group(1), [part.strip() for part in match.group(2).split(",")]
        if name.startswith("HGMMA"):
            first = int(re.search(r"gdesc\[UR(\d+)\]", match.group(2)).group(1))
            # Two descriptors of two registers; the first is unused if that factor is in registers.
            begin = first if operands[1].startswith("gdesc") else first + 2
            read = {("UR", n) for n in range(begin, first + 4)}
            if read & undefined or not read <= written:
                found.append(f"{name} {match.group(2)}")
            continue
        made = REGISTER.fullmatch(operands[0].split(".")[0])
        if made is None:
            continue
        kind, first = made.group(1), int(made.group(2))
        count = 4 if re.search(r"\.128|\.M88\.4", name) else 1
        if re.search(r"\.64\b|WIDE|^CS2R", name):
            count = 2
        result = {(kind, n) for n in range(first, first + count)}
        sources = {
            (k, int(n) + i)
            for part in operands[1:]
            for k, n in REGISTER.findall(part)
            for i in range(2 if ".64" in name else 1)
        }
        if name.split(".")[0] in PASSES and (sources - written or sources & undefined):
            undefined |= result
        else:
            undefined -= result
        written |= result
    return found
