"""A recipe's sources enter; token ids with a mask leave, and a report of all that was left out.

The stages in order, one module each; `prepare.py` runs them:

    locate    a source string -> files, a packaged file or a hub dataset id
    read      files -> rows, numbered as in the file
    formats   rows -> conversations or documents; the format is found by its columns
    turns     the cells of a row -> turns with roles and texts
    check     what is wrong with a row, counted; duplicates and overlap
    chunk     long documents -> windows at paragraph and sentence borders
    resolve   the tokenizer's chat template, or one supplied and said so
    render    turns -> text -> ids, and the template's habits
    template  conversations -> token ids and mask: the only place where a mask is made
    split     the seeded held-out part
    batch     examples -> padded tensors

`show.py` prints an example with its trained tokens marked.
"""
