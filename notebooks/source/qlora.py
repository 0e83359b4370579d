# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Fine-tune a chat model with QLoRA
#
# [Open in Colab](https://colab.research.google.com/github/<your-username>/Auto-RL/blob/main/notebooks/colab_qlora_finetune.ipynb) ·
# the sister page: [LoRA](colab_lora_finetune.ipynb), which explains the adapter itself
#
# LoRA trains two thin matrices beside each frozen one. QLoRA (Dettmers et al. 2023, arXiv
# 2305.14314) also stores the frozen ones in **4 bits instead of 16**, so that a 7B model trains
# on a free Colab T4:
#
# $$y = \text{dequantize}(W_{4\,bit})\, x + \frac{\alpha}{r}\, B A\, x$$
#
# This page **fine-tunes a real model** that way, from data to a file that Ollama runs, and
# **shows why it works**: behind each formula stands a cell that computes it on the model's own
# weights. How can 16 different numbers be enough for a model? By the end of part 4 you will have
# built them yourself.

# %% tags=["setting"]
METHOD = "qlora"

# %include shared/setup.py
# %include shared/data.py
# %include shared/template.py

# %% [markdown]
# ---
# ## 4 · How QLoRA works
#
# %include shared/laboratory.py

# %% [markdown]
# ### 4.1 What quantizing is
#
# To *quantize* is to round to few values. Four bits name $2^4 = 16$ of them. The plainest way is
# *INT4*: evenly spaced values from $-7$ to $7$, times one scale, chosen so that the largest weight
# still fits (*absmax*):
#
# $$q_i = \text{round}\!\left(\frac{7\, w_i}{\max_j |w_j|}\right) \qquad
#   w_i \approx \frac{q_i}{7}\, \max_j |w_j|$$
#
# (eq. 1 and 2 of the paper, there with 8 bits). One large weight, an *outlier*, would coarsen the
# steps for all others. So weights are taken in **blocks of 64**, each with a scale of its own. Any
# set of 16 values, a *code book*, works the same way: divide by the block's absmax, take the
# nearest value of the book.

# %% tags=["theory", "quick"]
BLOCK = 64
W = base.model.layers[15].mlp.up_proj.weight.detach()
INT4 = torch.arange(-7, 8, device=device) / 7


def quantize(weight, book, block=BLOCK):
    """Numbers of values in `book`, and one scale for each block of weights."""
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    borders = (book[1:] + book[:-1]) / 2
    return torch.bucketize(blocks / scales, borders), scales


def dequantize(numbers, scales, book, shape):
    return (book[numbers] * scales).reshape(shape)


def error(weight, book, block=BLOCK):
    """Root mean square error, as a share of the weights' own root mean square."""
    back = dequantize(*quantize(weight, book, block), book, weight.shape)
    return ((back - weight).square().mean() / weight.square().mean()).sqrt().item()


print(f"one matrix of {tuple(W.shape)}: {W.numel():,} weights from {W.min():.2f} to {W.max():.2f}")
for block in (64, 256, W.numel()):
    print(
        f"INT4, one scale for {block:7,} weights: error {error(W, INT4, block):6.1%}, {32 / block:.2f} bits a weight for scales"
    )
assert error(W, INT4, 64) < error(W, INT4, 256) < error(W, INT4, W.numel())

# %% [markdown]
# Small blocks, small error; and their scales cost half a bit a weight. Remember that half bit: 4.4.
#
# ### 4.2 Weights are normal
#
# Evenly spaced values are right for evenly spread numbers. Weights are not: they heap around zero
# like a *normal distribution*. Here are all matrices of layer 15 against the bell curve of the
# same width.

# %% tags=["theory", "quick"]
layer = torch.cat(
    [p.detach().flatten() for n, p in base.model.layers[15].named_parameters() if p.dim() == 2]
)
standard = (layer / layer.std()).clamp(-4, 4).cpu()
counts = torch.histc(standard, bins=64, min=-4, max=4) / standard.numel() * 8
places = torch.linspace(-4 + 1 / 16, 4 - 1 / 16, 64)
bell = torch.exp(-places.square() / 2) / math.sqrt(2 * math.pi)
print(
    f"{layer.numel():,} weights: {(standard.abs() < 1).float().mean():.1%} within one deviation of zero (normal: 68.3%)"
)
plt.plot(places, counts, label="weights")
plt.plot(places, bell, label="normal distribution")
plt.title("weights of layer 15, in standard deviations")
plt.legend()
plt.show()

# %% [markdown]
# ### 4.3 NF4: sixteen values, each used equally often
#
# Where many weights lie, values should lie close. *NormalFloat* puts the 16 values at
# **quantiles** of the normal distribution: points that cut it into slices of equal weight, so
# that each value names about as many weights as any other and no bit is wasted. With $Q$ the
# quantile function (inverse of the cumulative distribution), eq. 4 of the paper averages
# neighboring quantiles:
#
# $$q_i = \tfrac{1}{2}\left(Q\!\left(\tfrac{i}{2^k + 1}\right) + Q\!\left(\tfrac{i + 1}{2^k + 1}\right)\right)$$
#
# Two things are wanted besides: zero must be a value (padding, exact zeros), and the ends must be
# $-1$ and $1$. So the library takes 8 values above zero, 7 below and zero itself, with $Q$ from
# 0.5 to 0.9677 for each half, and divides by the largest. Built here from nothing but that:

# %% tags=["theory", "quick"]
import bitsandbytes.functional as bnb

Q = lambda p: math.sqrt(2) * torch.erfinv(2 * p - 1)
TAIL = 0.9677083
above = Q(torch.linspace(TAIL, 0.5, 9)[:-1])
below = -Q(torch.linspace(TAIL, 0.5, 8)[:-1])
NF4 = torch.cat([above, torch.zeros(1), below]).sort().values
NF4 = (NF4 / NF4.max()).to(device)

packed, state = bnb.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4")
theirs = state.code.to(device)
print(*(f"{value:+.4f}" for value in NF4.tolist()))
print(f"largest difference to the values that bitsandbytes uses: {(NF4 - theirs).abs().max():.1e}")
assert len(NF4) == 16 and torch.allclose(NF4, theirs, atol=1e-4)

# %% tags=["theory", "quick"]
FP4 = bnb.quantize_4bit(W, blocksize=BLOCK, quant_type="fp4")[1].code.to(device).unique()
sharpest = Q(torch.tensor(TAIL)).item()  # the value 1 in standard deviations
height = lambda v: math.exp(-((v * sharpest) ** 2) / 2)
along = [v / 50 for v in range(-60, 61)]
plt.plot(along, [height(v) for v in along], color="gray")
plt.vlines(NF4.tolist(), 0, [height(v) for v in NF4.tolist()], linewidth=0.7)
books = {"NF4": NF4, "FP4": FP4, "INT4": INT4}
for row, book in enumerate(books.values()):
    plt.plot(book.tolist(), [-0.3 * row] * len(book), "|", markersize=14, markeredgewidth=2.5)
plt.yticks([-0.3 * row for row in range(3)], books)
plt.title("the values of three 4-bit books, under the bell curve")
plt.show()

# %% [markdown]
# Are they used equally often? Nearly; a scale per block makes one weight in 64 an end of the book.
# And how large is each book's error, over all matrices of the model?

# %% tags=["theory", "quick"]
for title, book in {"NF4": NF4, "INT4": INT4}.items():
    used = torch.bincount(quantize(W, book)[0].flatten(), minlength=len(book)).float()
    used = used / used.sum()
    bits = -(used * used.clamp_min(1e-12).log2()).sum().item()
    print(
        f"{title:4}: rarest value {used.min():.1%}, commonest {used.max():.1%} of the weights; {bits:.2f} of 4 bits carry information"
    )

# %% tags=["theory", "quick"]
matrices = [p.detach() for n, p in base.named_parameters() if n.endswith("_proj.weight")]
errors = {
    title: sum(error(matrix, book) for matrix in matrices) / len(matrices)
    for title, book in {"NF4": NF4, "FP4": FP4, "INT4": INT4}.items()
}
assert errors["NF4"] < errors["FP4"] and errors["NF4"] < errors["INT4"]
bars(
    f"mean error over all {len(matrices)} matrices, percent",
    {k: 100 * v for k, v in errors.items()},
    "%",
    1,
)

# %% [markdown]
# A tenth of a weight is lost and the model still speaks? Errors of both signs meet in sums over
# hundreds of weights, and partly cancel. What is left is what the adapter is trained upon: it
# sees the rounded model, and learns around its faults.
#
# ### 4.4 Double quantization: 0.37 bits
#
# A scale of 32 bits for 64 weights is $32 / 64 = 0.5$ bits a weight, an eighth on top of the 4.
# So the scales are quantized as well, to 8 bits, in blocks of 256, with one 32-bit scale for each
# of those (section 3 of the paper):
#
# $$\frac{32}{64} = 0.5 \quad\longrightarrow\quad \frac{8}{64} + \frac{32}{64 \cdot 256} = 0.127
#   \qquad \text{saved: } 0.373 \text{ bits a weight}$$

# %% tags=["theory", "quick"]
saved = 32 / 64 - (8 / 64 + 32 / (64 * 256))
print(
    f"by the formula: {saved:.3f} bits a weight; on 6.5 billion weights {saved * 6.476e9 / 8 / 1e9:.2f} GB"
)


def stored_bits(weight, double):
    """Bits a weight that the library really keeps, counted on its tensors."""
    packed, state = bnb.quantize_4bit(
        weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    kept = [packed, state.absmax] + ([state.state2.absmax] if double else [])
    return 8 * sum(t.numel() * t.element_size() for t in kept) / weight.numel()


once, twice = stored_bits(W, False), stored_bits(W, True)
print(f"counted on bitsandbytes' tensors: {once:.3f} - {twice:.3f} = {once - twice:.3f} bits")
assert abs((once - twice) - saved) < 0.002
exact = bnb.dequantize_4bit(*bnb.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4"))
doubled = bnb.dequantize_4bit(
    *bnb.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
)
relative = lambda back: ((back - W).norm() / W.norm()).item()
print(
    f"error with exact scales {relative(exact):.2%}, with quantized scales {relative(doubled):.2%}"
)

# %% [markdown]
# ### 4.5 Dequantize on the fly
#
# No product is computed in 4 bits. When a layer's turn comes, its weights are unpacked into 16
# bits (here 32), multiplied with, and dropped. Two numbers lie in a byte, the first in the high
# half. By hand (eq. 6 of the paper), to the bit what the library does:

# %% tags=["theory", "quick"]
numbers = torch.stack([packed.flatten().long() >> 4, packed.flatten().long() & 15], -1).flatten()
by_hand = (theirs[numbers].reshape(-1, BLOCK) * state.absmax.reshape(-1, 1)).reshape(W.shape)
library = bnb.dequantize_4bit(packed, state)
print(
    f"{W.numel():,} weights in {packed.numel():,} bytes; largest difference {(by_hand - library).abs().max().item()}"
)
assert torch.allclose(by_hand, library, atol=1e-7)

# %% [markdown]
# And the layer with its adapter (eq. 5): $y = \text{dequantize}(W_q)\,x + s\,BAx$. Gradients pass
# *through* the frozen 4-bit matrix to the layers below, but none is made *for* it.

# %% tags=["theory", "quick"]
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit


class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Linear4bit(
            W.shape[1], W.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        self.up.weight = Params4bit(
            W.cpu().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )

    def forward(self, x):
        return self.up(x)


one = One().to(device)
one.is_loaded_in_4bit = True
one.up.support_avx512bf16_for_cpu = False  # a fault of that path in bitsandbytes 0.50.2
adapted = get_peft_model(one, LoraConfig(r=16, lora_alpha=4, target_modules=["up"]))
up = adapted.base_model.model.up
assert isinstance(up, AdaptedLinear4bit)
A, B = up.lora_A["default"].weight, up.lora_B["default"].weight
torch.nn.init.normal_(B, std=0.02)
x = torch.randn(5, W.shape[1], device=device, requires_grad=True)
y = adapted(x)
opened = bnb.dequantize_4bit(up.base_layer.weight, up.base_layer.weight.quant_state)
by_hand = x @ opened.T + 4 / 16 * (x @ A.T) @ B.T
y.sum().backward()
print(f"largest difference {(y - by_hand).abs().max():.1e} where y reaches {y.abs().max():.1f}")
print(
    f"gradient for x: {x.grad.norm():.1f}; for B: {B.grad.norm():.1f}; for W: {up.base_layer.weight.grad}"
)
assert torch.allclose(y, by_hand, atol=1e-3) and up.base_layer.weight.grad is None

# %% [markdown]
# ### 4.6 What rounding costs the whole model
#
# All seven matrices of all thirty layers, rounded with each book and put back. How far does the
# model's opinion on the next token move? The measure is the *KL divergence* from the exact model,
# in nats a token; 0 is the same opinion.

# %% tags=["theory"]
import copy

pairs = [encode(*pair)[0].to(device) for pair in town("heldout")[:8]]


@torch.no_grad()
def opinions(model):
    """Log-probabilities of the next token at every place of eight conversations."""
    return torch.cat([model(input_ids=ids[None]).logits[0] for ids in pairs]).log_softmax(-1)


exact = opinions(base)
rounded = copy.deepcopy(base)
moved = {}
for title, book in {"NF4": NF4, "FP4": FP4, "INT4": INT4}.items():
    with torch.no_grad():
        for (name, parameter), (_, original) in zip(
            rounded.named_parameters(), base.named_parameters(), strict=True
        ):
            if name.endswith("_proj.weight"):
                parameter.copy_(dequantize(*quantize(original, book), book, original.shape))
    moved[title] = (exact.exp() * (exact - opinions(rounded))).sum(-1).mean().item()
del rounded
assert moved["NF4"] < moved["INT4"] and moved["NF4"] < moved["FP4"]
bars("KL divergence from the exact model, nats a token", moved, digits=3)

# %% [markdown]
# NF4 loses least. Larger models lose less than this small one (Dettmers & Zettlemoyer 2022, arXiv
# 2212.09720), and training around the loss is what the adapter does.
#
# **Exercises.** (1) Build a 3-bit NF3 with 8 values: what is its error? (2) Double the blocks to
# 128: how many bits are saved, and what does the error gain? Is that a better bargain than double
# quantization? (3) In 4.3 take `TAIL = 0.99`: is the error larger or smaller, and why?
#
# **Sources.** Dettmers et al. 2023, arXiv 2305.14314: eq. 1-2 (absmax), eq. 4 and appendix E
# (NF4), section 3 (double quantization), eq. 5-6 (the layer). Dettmers & Zettlemoyer 2022
# (why four bits). The adapter itself: Hu et al. 2021, arXiv 2106.09685.

# %include shared/plan.py
# %include shared/train.py

# %% [markdown]
# ---
# ## 7 · LoRA against QLoRA
#
# The same rows, steps, seed and rank, with the base in 16 bits (on a CPU 32): what did four bits
# cost? Trained only in the `small` profile; a base that fits in 16 bits hardly needs QLoRA.

# %% tags=["run"]
mine = run.evaluate(samples=0)
if PROFILE == "small":
    twin = lorakit.finetune(
        settings,
        method="lora",
        output_dir=str(OUTPUT / "small-lora-twin"),
        resume=(OUTPUT / "small-lora-twin").exists(),
    )
    other = twin.evaluate(samples=0)
    twin.close()
    for title, found in {"LoRA": other, "QLoRA": mine}.items():
        print(f"{title:5} held-out loss: base {found.base.loss:.4f}, tuned {found.tuned.loss:.4f}")
    kept = (mine.base.loss - mine.tuned.loss) / (other.base.loss - other.tuned.loss)
    print(f"QLoRA's gain is {kept:.1%} of LoRA's")

# %% tags=["run"]
both = {"LoRA": twin, "QLoRA": run} if PROFILE == "small" else {"QLoRA": run}
for title, one in both.items():
    rows = [row for row in one.metrics if row.get("loss") is not None]
    plt.semilogy([row["step"] for row in rows], [row["loss"] for row in rows], label=title)
plt.title("loss while training, the same rows in the same order")
plt.xlabel("step")
plt.legend()
plt.show()

# %% [markdown]
# The rounded base starts worse, and the adapter repairs some of the rounding as well: so QLoRA's gain
# can be larger than LoRA's. What counts is where both end.
#
# **Exercises.** (1) Give QLoRA rank 4 and rank 64: does more rank make up for the rounding? (2) Put
# QLoRA's adapter onto the *unrounded* base (`run.export("merged", merge_base="original")`): which of the
# two held-out losses that it prints is lower, and why is the adapter not at home there?

# %include shared/evaluate.py
# %include shared/export.py
