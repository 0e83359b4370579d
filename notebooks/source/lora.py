# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Fine-tune a chat model with LoRA
#
# [Open in Colab](https://colab.research.google.com/github/<your-username>/Auto-RL/blob/main/notebooks/colab_lora_finetune.ipynb) ·
# the sister page: [QLoRA](colab_qlora_finetune.ipynb), for when the model does not fit in 16 bits
#
# This page does two things at once. It **fine-tunes a real model**, from data to a file that
# Ollama runs. And it **shows why each step works**: behind each formula stands a cell that
# computes it on the model's own weights, so nothing need be believed.
#
# $$W_{new} = W_{frozen} + \frac{\alpha}{r}\, B A$$
#
# That one line is LoRA (*low-rank adaptation*, Hu et al. 2021, arXiv 2106.09685). By the end of
# part 4 every sign of it will be plain.

# %% tags=["setting"]
METHOD = "lora"

# %include shared/setup.py
# %include shared/data.py
# %include shared/template.py

# %% [markdown]
# ---
# ## 4 · How LoRA works
#
# %include shared/laboratory.py

# %% [markdown]
# ### 4.1 What full fine-tuning costs
#
# Training all weights keeps, for every *parameter* (number of the model): the weight and its
# gradient in 16 bits (2 + 2 bytes), an exact copy in 32 bits (4), and AdamW's two running means
# in 32 bits (4 + 4). Sixteen bytes a parameter:
#
# $$\text{full} = 16 N \qquad\qquad \text{LoRA} = 2 N + 16\, n$$
#
# with $N$ frozen parameters and $n$ new, trained ones (4 bytes each for value, gradient and two
# means); *activations*, what the layers hand on and keep for the way back, come on top. All hangs
# on $n$ being small. For a matrix $W$ of $d_{out} \times d_{in}$, LoRA adds $A$ ($r \times d_{in}$)
# and $B$ ($d_{out} \times r$), so
#
# $$n = \sum_{\text{matrices}} r\,(d_{in} + d_{out}).$$

# %% tags=["theory"]
shapes = {"q, k, v, o": (4, 4096, 4096), "gate, up": (2, 4096, 11008), "down": (1, 11008, 4096)}
rank, layers = 16, 32
n = layers * sum(many * rank * (d_in + d_out) for many, d_in, d_out in shapes.values())
planned = lorakit.plan(model="llama-2-7b", method="lora", gpu="a100-80", lora_r=rank)
N = planned.parameters
assert n == planned.trainable  # by hand, and as lorakit counts the real model
print(f"Llama-2-7B: N = {N:,}; rank {rank} on all seven matrices: n = {n:,} ({n / N:.2%})")
q_and_v = layers * 2 * rank * (4096 + 4096)
print(f"on q and v alone, as in the paper: {q_and_v:,} ({q_and_v / N:.2%})")
print(
    f"full fine-tuning {16 * N / 1e9:.0f} GB, LoRA {(2 * N + 16 * n) / 1e9:.1f} GB, and activations on top"
)

# %% [markdown]
# That is the "0.1%" of the papers: q and v alone. Today all seven matrices are common, 0.6%: the
# memory is in the frozen weights anyway, and part 5 draws it.
#
# ### 4.2 Why a small update is enough
#
# The claim under LoRA: **the change that fine-tuning makes has low rank.** The *rank* of a matrix
# is how many independent directions it has. Any matrix is a sum of rank-one pieces, ordered by size:
#
# $$\Delta W = \sum_i \sigma_i\, u_i v_i^\top \qquad (\text{singular value decomposition, SVD})$$
#
# If a few $\sigma$ (*singular values*) carry nearly all, then a few directions are enough. Let us
# look: fine-tune the weights themselves, all attention outputs and all downward matrices of the
# small model, without LoRA, and take their change apart.

# %% tags=["theory", "trains"]
import copy

full = copy.deepcopy(base)
watched = {
    name: parameter
    for name, parameter in full.named_parameters()
    if name.endswith(("o_proj.weight", "down_proj.weight"))
}
for parameter in watched.values():
    parameter.requires_grad_(True)
train(full, steps=10, rate=2e-4)
start = dict(base.named_parameters())
deltas = {name: (parameter - start[name]).detach() for name, parameter in watched.items()}
trained_loss = held_out(full)
print(f"held-out loss {untrained:.3f} -> {trained_loss:.3f}")

# %% tags=["theory", "trains"]
name = "model.layers.15.self_attn.o_proj.weight"
change = torch.linalg.svdvals(deltas[name])
noise = torch.linalg.svdvals(torch.randn_like(deltas[name]))
share = lambda sigma: (sigma.square() / sigma.square().sum()).cumsum(0).tolist()
print(
    f"the 16 largest of {len(change)} carry {share(change)[15]:.0%}; of a random matrix {share(noise)[15]:.0%}"
)
directions = range(1, len(change) + 1)
plt.semilogx(directions, share(change), label="the trained update of one attention output")
plt.semilogx(directions, share(noise), label="a random matrix of the same shape")
plt.title("share of the update's square sum in its largest directions")
plt.xlabel("directions kept")
plt.ylim(bottom=0)
plt.legend()
plt.show()

# %% [markdown]
# Sixteen of 576 directions hold most of it; in a random matrix they would hold a tenth. But a large
# share of a sum of squares is not yet a good model. So the test that counts: **throw all but $r$
# directions away in each matrix, and ask how much of what was learned is still there.**

# %% tags=["theory", "trains"]
kept = {}
for r in (1, 2, 4, 8, 16, 32):
    with torch.no_grad():
        for name, delta in deltas.items():
            u, sigma, v = torch.svd_lowrank(delta, q=r + 8, niter=2)
            watched[name].copy_(start[name] + (u[:, :r] * sigma[:r]) @ v[:, :r].T)
    kept[r] = held_out(full)
gain = lambda loss: (untrained - loss) / (untrained - trained_loss)
for r, loss in kept.items():
    print(f"rank {r:2}: held-out loss {loss:.3f}, {gain(loss):4.0%} of the gain")
assert gain(kept[32]) > 0.8
del full, watched

# %% tags=["theory", "trains"]
plt.semilogx(kept.keys(), kept.values(), "o-", base=2, label="update cut to rank r")
plt.axhline(trained_loss, color="C1", label="whole update (rank up to 576)")
plt.axhline(untrained, color="C2", label="no update")
plt.xticks(list(kept), list(kept))
plt.title("held-out loss when only r directions of each update are kept")
plt.xlabel("rank r")
plt.legend()
plt.show()

# %% [markdown]
# So a low-rank update *found afterwards* does nearly the whole work. LoRA's idea is not to find
# it afterwards but to train nothing else from the start. (Intrinsic dimension: Aghajanyan et al.
# 2020, arXiv 2012.13255. Section 7.2 of the LoRA paper measures the same with subspaces.)
#
# ### 4.3 The decomposition, by hand
#
# Instead of a $d_{out} \times d_{in}$ update, keep its two thin factors:

# %% tags=["theory"]
figure, axes = plt.subplots(figsize=(6, 2.4))
axes.set(xlim=(0, 4.2), ylim=(-0.3, 1.1), aspect="equal", title="one adapted matrix")
axes.axis("off")
for x, y, wide, high, color, name, size in [
    (0, 0, 1, 1, "lightgray", "W, frozen", "d_out × d_in"),
    (1.9, 0, 0.25, 1, "C1", "B", "d_out × r"),
    (2.5, 0.4, 1, 0.25, "C0", "A", "r × d_in"),
]:
    axes.add_patch(plt.Rectangle((x, y), wide, high, color=color))
    axes.text(x + wide / 2, y + high / 2, name, ha="center", va="center")
    axes.text(x + wide / 2, y - 0.15, size, ha="center", color="gray")
axes.text(1.4, 0.5, r"+  $\frac{\alpha}{r}$ ·", ha="center", va="center", fontsize=14)
axes.text(2.32, 0.5, "·", ha="center", va="center", fontsize=14)
plt.show()
assert 16 * (4096 + 4096) == 131_072
print("rank 16 at d = 4096: 16.8 million numbers frozen, 131,072 trained")

# %% [markdown]
# A layer computes (eq. 3 of the paper; $x$ is its input, $s = \alpha / r$)
#
# $$y = W x + s\, B (A x) = (W + s\, B A)\, x$$
#
# The middle form is how it is trained: $Ax$ first, which is only $r$ numbers. The right form is
# how it is *merged* for good: one matrix again, no cost when it is used. Below, the PEFT library's
# own layer against both, on real hidden states.

# %% tags=["theory"]
from peft import LoraConfig, get_peft_model

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapters(rank, alpha, targets=tuple(SEVEN)):
    """A copy of the base with adapters on it; A is random, B is zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    return get_peft_model(copy.deepcopy(base), config)


model = with_adapters(rank=16, alpha=32)
layer = model.base_model.model.model.layers[10].self_attn.q_proj
W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
with torch.no_grad():
    B.normal_(std=0.02)  # as if it had been trained
    ids = words("The harbor town of Quillhaven", return_tensors="pt").input_ids.to(device)
    x = base.model(input_ids=ids, output_hidden_states=True).hidden_states[10]
    by_peft = layer(x)
    s = 32 / 16
    as_trained = x @ W.T + s * (x @ A.T) @ B.T
    as_merged = x @ (W + s * B @ A).T
print("W", tuple(W.shape), " A", tuple(A.shape), " B", tuple(B.shape), " x", tuple(x.shape))
print(
    f"largest difference to PEFT: {(as_trained - by_peft).abs().max():.1e} and {(as_merged - by_peft).abs().max():.1e},"
)
print(f"while the adapter moved the output by up to {(by_peft - x @ W.T).abs().max():.2f}")
assert torch.allclose(as_trained, by_peft, atol=1e-3) and torch.allclose(
    as_merged, by_peft, atol=1e-3
)

# %% [markdown]
# ### 4.4 Why $B$ starts at zero
#
# At the start $BA$ must be zero, or the model would be damaged before it learned anything. Both
# could be zero; or $B$; or $A$. The gradients say which ($g = \partial L / \partial y$):
#
# $$\frac{\partial L}{\partial B} = s\, g\,(A x)^\top \qquad
#   \frac{\partial L}{\partial A} = s\, B^\top g\, x^\top$$
#
# If both are zero, both gradients are zero, for ever. With $B = 0$ and a random $A$, $B$ learns
# at once, and $A$ from the second step on.

# %% tags=["theory"]
starts = {"A random, B zero (LoRA)": (1, 0), "both zero": (0, 0), "both random": (1, 1)}
pairs = town("train")[:4]
for title, (a, b) in starts.items():
    model = with_adapters(16, 32)
    factors = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            factors["A" if "lora_A" in name else "B"].append(parameter)
    with torch.no_grad():
        for parameter in factors["A"]:
            parameter.mul_(a)
        for parameter in factors["B"]:
            parameter.normal_(std=0.02 * b) if b else parameter.zero_()
    loss = answer_loss(model, pairs)
    loss.backward()
    size = {k: math.sqrt(sum(p.grad.square().sum().item() for p in v)) for k, v in factors.items()}
    print(
        f"{title:24} loss {loss.item():6.3f}, gradient of A {size['A']:7.4f}, of B {size['B']:7.4f}"
    )
    if (a, b) == (1, 0):
        assert size["A"] == 0 and size["B"] > 0
    if (a, b) == (0, 0):
        assert size["A"] == 0 and size["B"] == 0

# %% [markdown]
# ### 4.5 What is kept for the way back
#
# Backward needs what forward saw. A product $y = Wx$ keeps $x$ for $W$'s gradient, and needs $W$
# for $x$'s. A frozen $W$ needs no $x$; but the adapter beside it does, for $A$. So **LoRA saves
# the optimizer's memory, and of the activations hardly any.** What saves those is *gradient
# checkpointing* (Chen et al. 2016, arXiv 1604.06174): keep each layer's input alone and compute
# the rest again on the way back. Forward is one part of work; back, it is two for full fine-tuning
# and little more than one for LoRA (no gradient of $W$). So the second forward costs a third
# there, and up to a half here. The cell counts every saved tensor once.


# %% tags=["theory"]
def kept_for_backward(model, pairs):
    """Bytes that autograd holds after forward, weights left out."""
    own = {p.untyped_storage().data_ptr() for m in (model, base) for p in m.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer_loss(model, pairs)
    return sum(seen.values())


held = {}
everything = copy.deepcopy(base).requires_grad_(True)
held["full fine-tuning"] = kept_for_backward(everything, pairs)
del everything
model = with_adapters(16, 32)
held["LoRA"] = kept_for_backward(model, pairs)
model.enable_input_require_grads()
model.gradient_checkpointing_enable({"use_reentrant": False})
model.train()
held["LoRA, checkpointed"] = kept_for_backward(model, pairs)
bars("kept for backward, four short rows", {k: v / 2**20 for k, v in held.items()}, "MiB", 1)

# %% [markdown]
# On a GPU lorakit writes the backward pass of a whole layer itself, keeps less, and recomputes
# only as much as the memory asks for: the plan below says how much that is.
#
# ### 4.6 Rank and alpha, swept
#
# What do $r$ and $\alpha$ do? Theory: $r$ is how many directions the update may have; $s =
# \alpha / r$ multiplies the update, and so acts much like a larger learning rate. Let us see.
# Each run is 8 steps on the same rows in the same order.

# %% tags=["theory", "trains"]
swept = {}
for rank, alpha in [(1, 2), (4, 8), (16, 32), (16, 4), (16, 128)]:
    model = with_adapters(rank, alpha)
    train(model, steps=8, rate=1e-3)
    swept[rank, alpha] = held_out(model)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"r {rank:2}  alpha {alpha:3}  alpha/r {alpha / rank:5.2f}: {size:9,} trained, "
        f"held-out loss {swept[rank, alpha]:.3f}"
    )
del model

# %% tags=["theory", "trains"]
bars(
    "held-out loss after 8 steps (lower is better)",
    {"no training": untrained} | {f"r {r}, alpha {a}": loss for (r, a), loss in swept.items()},
    digits=3,
)

# %% [markdown]
# Rank 1, one direction a matrix, already learns, and more rank at the same $s$ learns faster. At
# rank 16 the scale $s$ alone does as much as the rank did: a small one learns slowly, as too small
# a learning rate would, and eight steps reward haste. That is why $\alpha$ is moved together with
# $r$ (lorakit's defaults: 32 and 16), or the scale is $\alpha / \sqrt{r}$ (`use_rslora`;
# Kalajdzievski 2023, arXiv 2312.03732), which keeps the update's size when $r$ grows.
#
# **Exercises.** (1) In 4.2, replace `AdamW` by plain `torch.optim.SGD` with `lr=0.05`: is the
# update's rank lower now? Why should it be? (2) In 4.6, run $(16, 4)$ with eight times the `rate`:
# does it meet $(16, 32)$? Should it, given how AdamW sizes its steps? (3) Put adapters on `q_proj` and
# `v_proj` alone, at a rank that gives as many parameters as rank 4 on all seven. Which is better?
#
# **Sources.** Hu et al. 2021, arXiv 2106.09685: eq. 3 (the layer), section 4.1 (initialization,
# $\alpha / r$), section 7 (rank). Aghajanyan et al. 2020, arXiv 2012.13255. Loshchilov & Hutter
# 2017, arXiv 1711.05101.

# %include shared/plan.py
# %include shared/train.py

# %% [markdown]
# ---
# ## 7 · What training changed
#
# The adapter is two small matrices for each adapted one, in a file that any PEFT program reads.
# Their product is $\Delta W$; its SVD is cheap, since it has at most $r$ directions.

# %% tags=["after"]
from safetensors.torch import load_file

saved = load_file(run.adapter / "adapter_model.safetensors")
settings = json.loads((run.adapter / "adapter_config.json").read_text())
scale = settings["lora_alpha"] / settings["r"]
spectra = {}
for name, A in saved.items():
    if name.endswith("lora_A.weight"):
        A, B = A.float(), saved[name.replace("lora_A", "lora_B")].float()
        # With B = Q R the singular values of B A are those of the small R A.
        spectra[name] = torch.linalg.svdvals(scale * torch.linalg.qr(B).R @ A)
bytes_ = (run.adapter / "adapter_model.safetensors").stat().st_size
print(f"{len(spectra)} adapted matrices, scale {scale:g}, {bytes_ / 1e6:.1f} MB on disk")
middle = sorted(n for n in spectra if "q_proj" in n)[len(spectra) // 14]
typical = spectra[middle]
effective = lambda sigma: (sigma.square().sum() / sigma.square().max()).item()
print(
    f"{middle.split('model.model.')[-1]}: {len(typical)} singular values, the largest is {typical[0] / typical[-1]:.0f} times the smallest"
)

# %% tags=["after"]
for kind in ("q_proj", "v_proj", "up_proj", "down_proj"):
    plt.plot(next(s for n, s in spectra.items() if kind in n).tolist(), label=kind)
plt.title("singular values of trained updates")
plt.xlabel("direction")
plt.ylim(bottom=0)
plt.legend()
plt.show()

# %% [markdown]
# Which kinds of matrices moved most? The length of the update (Frobenius norm, the root of the
# square sum), averaged over the layers:

# %% tags=["after"]
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
moved = {
    kind: sum(s.norm().item() for n, s in spectra.items() if kind in n)
    / max(1, sum(kind in n for n in spectra))
    for kind in KINDS
}
bars("mean length of the update, by kind of matrix", moved)

# %% [markdown]
# **Exercises.** (1) Which layers moved most, the first or the last? Group by the number in the name.
# (2) How many directions of each update carry 90% of its square sum? Would a smaller rank have done?
# (3) Set all singular values but the first of each update to zero, and evaluate that adapter.

# %include shared/evaluate.py
# %include shared/export.py
