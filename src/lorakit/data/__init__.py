"""A recipe's sources enter; token ids with a mask leave, and a report of all that was left out.

The stages in order, one module each; `prepare.py` runs them:

    locate    a source string -> files, an address or a hub dataset id
    remote    addresses -> bytes, from public hosts only; hub: dataset ids -> rows
    lines     files -> bytes, unpacked, and lines of text
    read      files -> rows, numbered as in the file
    formats   rows -> conversations or documents; the format is found by its columns
    turns     the cells of a row -> turns with roles and texts; tools: its tool calls and schemas
    clean     texts without control characters, in composed letters
    check     what is wrong with a row, counted
    gather    all of these, for the sources of a recipe; the usable rows go on a shelf
    shelf     items and examples on disk, by number; items: one item as a line
    cache     shelves that were made before are found by what decides their content
    resolve   the tokenizer's chat template, or one supplied and said so
    render    turns -> text -> ids, and the template's habits
    spans     where the answers stand in a rendered text
    ids       texts -> ids at the tokenizer's own speed
    template  conversations -> token ids and mask: the only place where a mask is made
    shorten   a conversation that is too long -> several
    chunk     where a long text may be cut; documents: long texts -> examples or requests
    verify    an example that would spoil a run is refused
    near      duplicates and overlap, exact and nearly
    split     the seeded held-out part
    pack      lengths -> groups that fill micro-batches
    batch     examples -> tensors, packed or padded

For people: `inspection.py` gathers figures (`lengths.py`) and examples token by token;
`display/inspection.py` shows them.
"""
