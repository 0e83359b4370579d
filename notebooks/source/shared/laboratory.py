# %% [markdown]
# ### The laboratory
#
# The experiments of this part run on SmolLM2-135M in both profiles: all of its weights are here
# in memory, and an experiment takes seconds, on the CPU: the card stays free for your own model.
#
# First, the whole of training in one cell. It is what every trainer does at heart: *forward*
# (predict), *loss* (how wrong), *backward* (the slope of the loss for each number, the
# *gradient*), and a step against the slope by AdamW (arXiv 1711.05101), the *optimizer*, which
# sizes each number's step by that number's own recent gradients.

# %% tags=["theory", "quick"]
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

device = "cpu"
laboratory = locate_model(lorakit.load_recipe(model="demo", data="demo").recipe)
words = AutoTokenizer.from_pretrained(laboratory)
base = AutoModelForCausalLM.from_pretrained(laboratory, dtype=torch.float32)
base = base.requires_grad_(False).to(device)


def town(name):
    lines = files("lorakit").joinpath(f"assets/demo_{name}.jsonl").read_text().splitlines()
    return [(row["instruction"], row["response"]) for row in map(json.loads, lines)]


def encode(question, answer):
    """Token ids, and how many of them are only read. An empty system turn keeps rows short."""
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    read = words.apply_chat_template(turns, add_generation_prompt=True, return_dict=True).input_ids
    turns += [{"role": "assistant", "content": answer}]
    ids = words.apply_chat_template(turns, return_dict=True).input_ids
    return torch.tensor(ids[:-1]), len(read)  # less the line end after the last sign


def answer_loss(model, pairs):
    """Mean of -log p(token) over the answers' tokens, in nats (eq. 1 of the LoRA paper)."""
    rows = [encode(*pair) for pair in pairs]
    ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True).to(device)
    where = torch.arange(ids.shape[1], device=device)
    read = torch.tensor([n for _, n in rows], device=device)[:, None]
    size = torch.tensor([len(row) for row, _ in rows], device=device)[:, None]
    trained = ((where >= read) & (where < size))[:, 1:]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    hidden = decoder(input_ids=ids, attention_mask=(where < size).long()).last_hidden_state
    logits = F.linear(hidden[:, :-1][trained], base.lm_head.weight)
    return F.cross_entropy(logits, ids[:, 1:][trained])


def train(model, steps, rate, batch=8):
    """`steps` steps of AdamW over the town's rows."""
    pairs = town("train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        begin = step * batch % len(pairs)
        loss = answer_loss(model, pairs[begin : begin + batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def held_out(model):
    """Loss on sixteen of the questions that training does not see."""
    return answer_loss(model, town("heldout")[:16]).item()


untrained = held_out(base)
print(f"before any training: {untrained:.3f} nats a token, perplexity {math.exp(untrained):.1f}")

# %% [markdown]
# *Perplexity* is $e^{\text{loss}}$: among how many tokens, all alike, the model would seem to
# choose at each place. 1 is certainty.
