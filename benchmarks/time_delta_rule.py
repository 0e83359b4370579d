"""Time the gated delta rule's kernels both ways, setting by setting, and compare them with float64.

    python benchmarks/time_delta_rule.py --out result.json

Shape of Qwen3.5-4B and 9B: 32 value heads, 16 key heads, 128 wide; 24 of 32 layers. Times are of
CUDA graph replays, so without the host. Errors are norms relative to the same formula in float64,
which `tests/ops/test_gated_delta_rule.py` compares with the recurrence; "plain" is transformers'
torch implementation. `--tiny` runs all of it on a CPU, in Triton's interpreter.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.model.kernel_functions import _definition
from lorakit.ops import causal_conv, causal_conv_triton
from lorakit.ops import gated_delta_rule as op
from lorakit.ops import gated_delta_rule_triton as kernels

NAMES = ("q", "k", "v", "g", "beta")
LAYERS = 24
# Tried in this order until the time is over; the first of each is the present one. No scan has one
# stage: Triton 3.6 miscompiles it (gated_delta_rule_triton.py).
CHOICES = {
    "SCAN": [(32, 4, 3), (32, 4, 2), (16, 4, 2), (64, 4, 2), (64, 8, 2), (32, 8, 2)],
    "SCAN_BACKWARD": [(32, 4, 2), (32, 4, 3), (16, 4, 2), (64, 8, 2), (32, 8, 2)],
    "GRADS": [(64, 8, 1), (64, 8, 2), (32, 8, 2), (32, 8, 3), (32, 4, 2), (128, 8, 1)],
    "INVERSE": [(0, 4, 1), (0, 2, 1), (0, 8, 1)],
    "OUTPUT": [(128, 4, 1), (64, 4, 1), (128, 8, 1)],
    "LOCAL": [(128, 4, 1), (64, 4, 1), (128, 8, 1)],
}
BACKWARD = ("SCAN_BACKWARD", "GRADS", "LOCAL")


def milliseconds(function, repeats=20):
    """Mean of replays of one CUDA graph; on a CPU of one call."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def inputs(batch, tokens, heads, width, dtype, device):
    """Like those of a trained layer: sigmoid beta, decays from none to strong, related keys."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, heads // 2, width, device=device) for _ in "qk")
    k = k + torch.randn(batch, 1, heads // 2, width, device=device)
    v = torch.randn(batch, tokens, heads, width, device=device)
    strength = torch.logspace(-3, 1, heads, device=device)
    g = -strength * torch.nn.functional.softplus(torch.randn(batch, tokens, heads, device=device))
    beta = torch.randn(batch, tokens, heads, device=device).sigmoid()
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta.to(dtype)]


def errors(found, expected):
    """Relative norm of each difference, and whether all numbers are finite."""
    rows = {}
    for name, ours, theirs in zip(("o", *NAMES), found, expected, strict=True):
        apart = (ours.double() - theirs).norm() / theirs.norm()
        rows[name] = float(f"{float(apart):.3g}")
    return rows


def exact(given, dout, documents):
    """Output, gradients and what the backward reads, in float64."""
    wide = [t.double() for t in given]
    out, saved = op.delta_rule_reference(*wide, documents, True)
    grads = op.delta_rule_backward_reference(
        dout.double(), wide[2], wide[4], documents, True, saved
    )
    return out, *grads, saved


class Case:
    """One shape: its inputs, and our kernels each way."""

    def __init__(self, batch, options, documents=None):
        self.given = inputs(batch, options.tokens, options.heads, options.width, *options.where)
        self.documents = documents
        self.dout = torch.randn_like(self.given[2])
        self.saved = self.forward()[1]

    def forward(self):
        return kernels.delta_rule_triton(*self.given, self.documents, True)

    def backward(self):
        return kernels.delta_rule_backward_triton(
            self.dout, self.given[2], self.given[4], self.documents, True, self.saved
        )

    def results(self):
        out, self.saved = self.forward()
        return out, *self.backward()


def plain(case):
    """transformers' implementation: (times, results)."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    function = _definition(qwen.torch_chunk_gated_delta_rule)
    groups = case.given[2].shape[2] // case.given[1].shape[2]
    leaves = [t.detach().clone().requires_grad_() for t in case.given]
    cuda = torch.cuda.is_available()

    def clock():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        start = clock()
        q, k = (t.repeat_interleave(groups, 2) for t in leaves[:2])
        out = function(q, k, leaves[2], g=leaves[3], beta=leaves[4], use_qk_l2norm_in_kernel=True)
        middle = clock()
        out[0].backward(case.dout)
        end = clock()
    times = {"forward_ms": 1e3 * (middle - start), "backward_ms": 1e3 * (end - middle)}
    return times, (out[0].detach(), *(leaf.grad for leaf in leaves))


def measure(case, with_plain=False):
    expected = exact(case.given, case.dout, case.documents)
    row = {"errors": errors(case.results(), expected[:6]), "saved_errors": {}}
    for name, ours in case.saved._asdict().items():
        theirs = getattr(expected[6], name)
        row["saved_errors"][name] = float(f"{float((ours - theirs).norm() / theirs.norm()):.3g}")
    row["repeatable"] = all(map(torch.equal, case.results(), case.results()))
    row["forward_ms"] = milliseconds(case.forward)
    row["backward_ms"] = milliseconds(case.backward)
    row["layers_ms"] = LAYERS * (row["forward_ms"] + row["backward_ms"])
    if with_plain:
        row["plain"], results = plain(case)
        row["plain"]["errors"] = errors(results, expected[:6])
    return row


def per_kernel(case):
    """Microseconds of each kernel."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            case.results()
        torch.cuda.synchronize()
    rows = profile.key_averages()
    return {
        r.key: round(r.self_device_time_total / r.count, 1)
        for r in rows
        if r.key.startswith("_") and r.count
    }


def try_settings(case, deadline):
    """Each setting's time and largest error; the fastest right one stays."""
    expected = exact(case.given, case.dout, case.documents)
    usual = max(errors(case.results(), expected[:6]).values())
    found = {}
    for name, choices in CHOICES.items():
        settings = getattr(kernels, name)
        function = case.backward if name in BACKWARD else case.forward
        rows, best = [], (float("inf"), dict(settings))
        for block, warps, stages in choices:
            if time.monotonic() > deadline:
                break
            if block:
                settings["BLOCK_N"] = block
            settings.update(num_warps=warps, num_stages=stages)
            row = {"setting": [block, warps, stages]}
            try:
                row["error"] = max(errors(case.results(), expected[:6]).values())
                row["ms"] = round(milliseconds(function), 4)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
                if "illegal" in row["failed"]:  # nothing runs in this process any more
                    found[name] = {"tried": [*rows, row], "best": best[1]}
                    return found
            else:
                right = row["error"] < 2 * usual
                best = min(best, (row["ms"], dict(settings)), key=lambda p: p[0]) if right else best
            rows.append(row)
            print(name, row, flush=True)
        settings.update(best[1])
        found[name] = {"tried": rows, "best": dict(settings)}
    return found


def convolution(options):
    """The convolution before the rule: ours, and torch's with its gradient."""
    kind, device = options.where
    channels = 2 * options.heads * options.width
    x = torch.randn(1, options.tokens, channels, device=device, dtype=kind)
    weight = torch.randn(channels, 4, device=device, dtype=kind)
    given = (x, weight, None, True, packed(options))
    dy = torch.randn_like(x)
    leaf = x.transpose(1, 2).detach().requires_grad_()

    def torchs():
        out = torch.nn.functional.conv1d(leaf, weight.unsqueeze(1), padding=3, groups=channels)
        out = torch.nn.functional.silu(out[:, :, : x.shape[1]])
        return torch.autograd.grad(out, leaf, dy.transpose(1, 2))

    def shifted():
        out = causal_conv.causal_conv_reference(leaf, weight, None, True)
        return torch.autograd.grad(out, leaf, dy.transpose(1, 2))

    return {
        "forward_ms": milliseconds(lambda: causal_conv_triton.causal_conv_triton(*given)),
        "backward_ms": milliseconds(
            lambda: causal_conv_triton.causal_conv_backward_triton(dy, *given)
        ),
        "torch_both_ms": milliseconds(torchs),
        "shifted_both_ms": milliseconds(shifted),
    }


def packed(options):
    """Document numbers of one row: lengths of 1 to 700 tokens."""
    ends = torch.arange(options.tokens, device=options.where[1])
    return (((ends * 7919) % 701) < 6).cumsum(0).to(torch.int32).unsqueeze(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=55.0, help="stop trying settings then")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.tokens, options.heads, options.width = (100, 2, 16) if options.tiny else (2048, 32, 128)
    kind = torch.float32 if options.tiny else torch.bfloat16
    options.where = (kind, torch.device("cpu" if options.tiny else "cuda"))

    result = {"command": "python benchmarks/time_delta_rule.py"}

    def note(name, value):
        """Print and save what is known: a later kernel may lose the GPU."""
        result[name] = value
        print(name, json.dumps(value, indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    case = Case(1, options)
    note("compiled after s", round(time.monotonic() - deadline + options.seconds, 1))
    note("1 x 2048", measure(case, with_plain=True))
    note("kernels_us", per_kernel(case))
    note("1 x 2048 packed", measure(Case(1, options, packed(options))))
    note("convolution", convolution(options))
    note("settings", try_settings(case, deadline))
    if any("illegal" in str(row) for row in result["settings"].values()):
        sys.exit("a setting crashed the GPU context; remove it from CHOICES and run again")
    note("1 x 2048 best", measure(case))
    note("kernels_us_best", per_kernel(case))
    del case
    note("4 x 2048 best", measure(Case(4, options)))
    device = detect_device("auto")
    note("gpu", device.name)
    for name, value in provenance(device, result["command"]).items():
        note(name, value)


if __name__ == "__main__":
    main()
