"""Convert the sources of a recipe to token ids with a loss mask, and report left-out rows.

The stages in order; `prepare_data` runs them:

    sources/locate           a source string -> files, an address or a hub dataset id
    sources/http             addresses -> bytes, from public hosts only; hub_datasets: ids -> rows
    sources/files            files -> bytes, decompressed, and lines of text
    sources/readers          files -> rows, numbered as in the file; json_stream: one JSON array
    formats/row_formats      rows -> conversations or documents; columns select the format
    formats/messages         cells of a row -> messages with roles, tool calls and schemas
    formats/normalize        texts without control characters, in composed letters
    issues                   faults of rows, counted
    conversations            all of these, for the sources of a recipe
    dataset                  conversations and tokenized examples in Arrow files, read by number
    cache                    these files, reused by a hash of everything they depend on
    chat_template/select     the tokenizer's chat template, or a supplied one, with a note
    chat_template/render     messages -> text -> ids, and what a template can write
    chat_template/sandbox    limits on the time and memory that a template may take
    tokenize/spans           character spans of the answers in a rendered text
    tokenize/batch_tokenizer texts -> ids in batches
    tokenize/encode          conversations -> ids and loss mask (plain text: tokenize/documents)
    tokenize/truncate        a conversation that is too long -> several
    tokenize/documents       long texts -> windows or instruction pairs
    tokenize/example_checks  refuse an example that would spoil a run
    data_notes               sentences on the loss mask and on repeated rows
    dedup                    duplicates and overlap, exact and near (MinHash)
    split                    the seeded held-out split
    batching                 lengths -> micro-batches; examples -> tensors, packed or padded

`inspection` collects statistics and examples token by token; `display/inspection_view` prints them.
"""
